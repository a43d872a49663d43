"""Trace methods and optimizers over several GPUs, and keep the peaks: `python -m tools.traced_methods`.

A job that the file has is not run again. Each is four layers of a built-in model. Needs deepspeed, whose own engine runs under
ZeRO.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peftplan
from peftplan.analytic.shown import OVER_4_BITS, PLAIN_METHODS, TRACED_METHODS
from peftplan.arch import catalogue
from peftplan.errors import RefusedError

KEPT = Path(__file__).parents[1] / "tests" / "distributed" / "traced_methods.jsonl"
LAYERS = 4
TOKENS = {"num_virtual_tokens": 20}
OF_METHOD = {"partial": {"trainable_layers": 1}, "prompt-tuning": TOKENS, "p-tuning": TOKENS, "prefix-tuning": TOKENS}
OPTIMIZERS = ("sgd", "rmsprop")
SIZES = {"gpus": 4, "batch_size": 2, "seq_len": 256}
LATER = {
    "adafactor": ("zero1", "zero2", "zero3"),
    "schedule_free_adamw": ("fsdp2", "zero1", "zero2", "zero3"),
    "schedule_free_sgd": ("zero2",),
    "adagrad": ("fsdp2",),
}
"""Further optimizers → the strategies that they run under."""
OTHER_MODELS = {
    "fsdp1": ("llama-pro",),
    "fsdp2": ("lora+", "fourierft", "houlsby", "boft", "prefix-tuning"),
    "zero2": ("lora+", "pfeiffer", "prefix-tuning"),
    "zero3": ("adalora", "houlsby", "p-tuning"),
}
"""Strategy → methods that are traced with a second model and other numbers of ranks too."""
NOT_CAST = {"accelerate": "0.28", "dtype": "fp16", "autocast": "fp16", "adapter_dtype": "fp16", "optim": "adamw_torch"}
"""FSDP1 before accelerate casts what trains to fp32."""
STRATEGIES = ("fsdp2", "zero1", "zero2", "zero3")


def jobs() -> Iterator[dict[str, Any]]:
    """Every method with AdamW, also over 4 bits, and every optimizer with full fine-tuning and with LoRA, under each strategy."""
    for strategy, methods in TRACED_METHODS.items():
        for method in ("rslora", *methods, *PLAIN_METHODS.get(strategy, ())):
            yield {"model": "qwen2.5-0.5b", "strategy": strategy, **SIZES, "method": method, **OF_METHOD.get(method, {})}
    for strategy, methods in OVER_4_BITS.items():
        for method in methods:
            named = {"method": "qlora", "use_dora": True} if method == "dora" else {"method": method, "quant": "nf4"}
            yield {"model": "qwen2.5-0.5b", "strategy": strategy, **SIZES, **named}
    for named in ({"method": "full", "optim": "sgd"}, {"method": "full", "optim": "schedule_free_adamw"}, {"method": "dora"}):
        yield {"model": "qwen2.5-0.5b", "strategy": "fsdp2", **SIZES, **named, "offload_params": "cpu"}
    for method, model in (("full", "pythia-160m"), ("lora", "llama-3.2-1b")):
        yield {"model": model, "strategy": "fsdp1", **SIZES, "method": method, **NOT_CAST}
    for strategy, methods in OTHER_MODELS.items():
        for number, method in enumerate(methods):
            model, gpus = (("llama-3.2-1b", 8), ("gemma-3-270m", 2))[number % 2]
            sizes = {**SIZES, "gpus": gpus, "gradient_checkpointing": gpus == 8 and method != "prefix-tuning"}
            yield {"model": model, "strategy": strategy, **sizes, "method": method, **OF_METHOD.get(method, {})}
    for number, strategy in enumerate(STRATEGIES):
        sizes = {"strategy": strategy, **SIZES}
        for optim in OPTIMIZERS:
            for method in ("full", "lora"):
                yield {"model": "llama-3.2-1b", **sizes, "method": method, "optim": optim}
        for optim in (optim for optim, strategies in LATER.items() if strategy in strategies):
            for method in ("full", "lora") if strategy in ("fsdp2", "zero3") else ("full",):
                yield {"model": "llama-3.2-1b", **sizes, "method": method, "optim": optim}
        model = ("qwen3-0.6b", "opt-125m", "pythia-160m", "gemma-3-270m")[number]
        checkpoints = {"gradient_checkpointing": number % 2 == 0, "gradient_accumulation_steps": 2}
        yield {"model": model, **sizes, "gpus": 8, "method": "loha", "optim": "sgd", **checkpoints}
        if strategy != "fsdp2":  # SFTTrainer's loss has no formula there
            yield {"model": "smollm2-135m", **sizes, "gpus": 2, "method": "dora", "r": 64, "optim": "rmsprop", "trainer": "trl"}


def shallow(name: str) -> dict[str, Any]:
    """A built-in model's config with its first layers alone."""
    entry = catalogue.find(name)
    assert entry is not None
    config = dict(entry.facts()["config"])
    config |= {key: LAYERS for key in ("num_hidden_layers", "n_layer") if key in config}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:LAYERS]
    return config


def peaks(job: dict[str, Any], engine: str) -> dict[str, Any] | None:
    """Bytes of each phase, and those reserved; None where the engine has none."""
    options = {name: value for name, value in job.items() if name != "model"}
    result = peftplan.estimate(shallow(job["model"]), engine=engine, **options)  # type: ignore[arg-type]
    if result.peaks is None:
        return None
    written = result.to_dict()
    memory = written["distributed"]["ranks"][0] if job["strategy"] == "fsdp1" else written["memory"]  # the trace plays rank 0
    return {"by_phase": memory["peak_by_phase"], "reserved": memory["peak_reserved"]}


def kept() -> list[dict[str, Any]]:
    """The rows of the file, if there is one."""
    return [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()] if KEPT.exists() else []


if __name__ == "__main__":
    known = [{name: value for name, value in row.items() if name != "traced"} for row in kept()]
    with KEPT.open("a", encoding="utf-8") as file:
        for job in jobs():
            if job in known:
                continue
            try:
                file.write(json.dumps({**job, "traced": peaks(job, "trace")}) + "\n")
            except RefusedError as error:
                print(job, error)
            file.flush()
