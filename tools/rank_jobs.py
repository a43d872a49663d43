"""Rehearse one rank of jobs over several GPUs, and compare the formulas with torch's own allocator.

    python -m tools.rank_jobs --run [NAME ...]     rehearses jobs that have no row yet, with --one the next of them (needs the
                                                   CUDA build of torch); exits 1 where there is none
    python -m tools.rank_jobs                      compares, and writes the table of docs/how-to/several-gpus.md

Each job runs tests/distributed/programs/trainer.py: transformers' Trainer on a small Llama. Rows lie in
tests/distributed/rank_jobs.jsonl.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from tools.rank_grid import SMALL, cut, sharded_jobs
from tools.rehearsed_jobs import program_words

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "distributed" / "programs" / "trainer.py"
BUILT_IN = ROOT / "tools" / "rehearsed_program.py"
ROWS = ROOT / "tests" / "distributed" / "rank_jobs.jsonl"
PAGE = ROOT / "docs" / "how-to" / "several-gpus.md"
MARKS = ("<!-- rank jobs -->", "<!-- end of rank jobs -->")
CARD = "h200"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed")
PHASES = ("load", "forward", "backward", "step")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
"""Llama-3.2-1B cut to three layers, with a head of its own."""
CLASSES: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
}


def jobs() -> Iterator[dict[str, Any]]:
    """Every job of the grid: its options here, what the program is told, and its world."""
    odd = {**SMALL, "vocab_size": 50001}
    variants: tuple[dict[str, Any], ...] = (
        {"accumulation": 3},
        {"config": {"tie_word_embeddings": True}},
        {"config": odd},
        {"checkpointing": False},
        {"optim": "adamw_torch"},
        {"fsdp": {"reshard_after_forward": False}},
        {"batch_size": 2, "seq_len": 1024},
        {"fsdp": {"cpu_ram_efficient_loading": True}},
        {},
    )
    for model_type, method in product(("qwen3", "qwen2", "mistral"), ("lora", "full")):
        yield job("fsdp2", method, 4, config={"model_type": model_type, **CLASSES[model_type]})
    for more, method in product(({}, {"accumulation": 2}, {"checkpointing": False}), ("full", "lora")):
        yield job("ddp", method, 4, **more)
    yield job("fsdp2", "qlora", 4)
    yield job("fsdp2", "qlora", 4, quant_storage="uint8")
    for more, method in product(variants, ("full", "lora")):
        yield job("fsdp2", method, 8, **more)
    for method, layers in product(("full", "lora"), (1, 2, 6)):
        yield job("fsdp2", method, 4, config={"num_hidden_layers": layers})
    for world, method in product((2, 4, 64), ("full", "lora", "qlora")):
        yield job("fsdp2", method, world)
    for r in (4, 64):
        yield job("fsdp2", "lora", 16, r=r)
    for more, method in product(variants, ("full", "lora")):
        yield job("fsdp2", method, 3, **more)
    yield job("ddp", "full", 8)
    yield job("ddp", "lora", 8)
    yield from zero_jobs()
    for strategy, method, world, more in sharded_jobs():
        yield job(strategy, method, world, **more)


def zero_jobs() -> Iterator[dict[str, Any]]:
    """Jobs of DeepSpeed. `zero`: fields of `zero_optimization` beside the stage."""
    odd, deep = {**SMALL, "vocab_size": 50001}, {"num_hidden_layers": 16, "tie_word_embeddings": True}
    offloaded = {"offload_optimizer": {"device": "cpu"}}
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"zero": {"overlap_comm": True}},
        {"accumulation": 3},
        {"checkpointing": False, "zero": {"overlap_comm": True}},
        {"zero": {"reduce_bucket_size": 20_000_000, "overlap_comm": True}},
        {"zero": offloaded},
        {"config": odd, "zero": {"overlap_comm": True}},
        {"config": deep},
    )
    for more, method in product(variants, ("lora", "full")):
        yield job("zero2", method, 4, **more)
    for world, method in product((2, 3, 16, 64), ("full", "lora")):
        yield job("zero2", method, world)
    yield job("zero2", "qlora", 4)
    yield job("zero2", "full", 8, zero=offloaded | {"overlap_comm": True}, accumulation=2)
    yield job("zero2", "full", 8, optim="adamw_torch", batch_size=2, seq_len=1024)
    yield job("zero2", "lora", 8, config={"model_type": "qwen3", **CLASSES["qwen3"]})
    yield job("zero2", "full", 4, zero={"reduce_bucket_size": "auto"})
    yield job("zero2", "full", 4, zero={"round_robin_gradients": True, "overlap_comm": True})
    yield job("zero2", "full", 4, zero={"reduce_scatter": False})
    for more, method in product(({}, {"accumulation": 3}, {"zero": {"overlap_comm": True}, "accumulation": 2}), ("full", "lora")):
        yield job("zero1", method, 4, **more)
    yield job("zero1", "full", 64)
    for method in ("lora", "full", "qlora"):
        yield published("llama-3.2-1b", method, trainer="trl", seq_len=1024)
    for model, method in product(FAMILIES, ("lora", "full")):
        yield published(model, method, trainer="transformers", seq_len=256)
    yield from zero3_jobs()


AUTO = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto")
"""Fields that transformers fills in from the hidden size."""


def zero3_jobs() -> Iterator[dict[str, Any]]:
    """Jobs of DeepSpeed whose ranks hold shards of the weights."""
    odd, deep = {**SMALL, "vocab_size": 50001}, {"num_hidden_layers": 16, "tie_word_embeddings": True}
    few = {"stage3_max_live_parameters": 300_000_000, "stage3_max_reuse_distance": 100_000_000}
    cpu = {"device": "cpu"}
    variants: tuple[dict[str, Any], ...] = (
        {"zero": AUTO},
        {},
        {"zero": AUTO, "checkpointing": False},
        {"zero": AUTO | few},
        {"zero": AUTO, "accumulation": 3},
        {"zero": AUTO, "config": deep},
        {"zero": AUTO, "config": odd},
        {"zero": AUTO | {"offload_optimizer": cpu}},
        {"zero": AUTO | {"offload_param": cpu, "offload_optimizer": cpu}},
        {"zero": {"overlap_comm": False, "sub_group_size": 50_000_000}},
    )
    for more, method in product(variants, ("full", "lora")):
        yield job("zero3", method, 4, **more)
    for world, method in product((2, 3, 8, 64), ("full", "lora")):
        yield job("zero3", method, world, zero=AUTO)
    yield job("zero3", "qlora", 4, zero=AUTO)
    yield job("zero3", "lora", 4, zero=AUTO, config={"model_type": "qwen3", **CLASSES["qwen3"]}, checkpointing=False)
    for model, method in product(("gpt2", "opt-125m", "qwen2.5-0.5b", "qwen3-0.6b"), ("lora", "full")):
        yield published(model, method, strategy="zero3", trainer="transformers", seq_len=256)


FAMILIES = ("gemma-3-270m", "pythia-160m", "gpt2", "opt-125m", "bloom-560m", "qwen2.5-0.5b", "qwen3-0.6b")
"""Built-in models of other kinds than Llama, and of full depth."""


def published(model: str, method: str, *, strategy: str = "zero2", **settings: Any) -> dict[str, Any]:
    """A job of a built-in model under ZeRO on 4 ranks, which tools/rehearsed_program.py runs with DeepSpeed's config."""
    settings = {"method": method, "r": 16, "batch_size": 2, **settings}
    name = " ".join([strategy, method, "4", model, f"trainer={settings['trainer']}"])
    return {"name": name, "strategy": strategy, "world": 4, "model": model, "program": settings, "fsdp": {}}


def job(
    strategy: str,
    method: str,
    world: int,
    *,
    fsdp: dict[str, Any] | None = None,
    zero: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """One job by its name: what decides it."""
    named = {**settings, **({"fsdp": fsdp} if fsdp else {}), **({"zero": zero} if zero else {})}
    name = " ".join([strategy, method, str(world), *(f"{k}={json.dumps(v)}" for k, v in named.items())])
    program = {"method": method, **settings}
    if strategy in ("fsdp1", "fsdp2"):
        config = {"version": int(strategy[-1]), **(fsdp or {})}
        arguments: dict[str, Any] = {"fsdp": "full_shard"}
        if config.pop("offload_params", None):
            config["cpu_offload"] = True
        if config.pop("sync_each_batch", None):
            arguments["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        if (prefetch := config.pop("backward_prefetch", None)) is not None:
            config["backward_prefetch"] = f"backward_{prefetch}"
        program["arguments"] = {**arguments, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", **config}}
    if (
        strategy == "ddp"
    ):  # Trainer looks for unused parameters of a PeftModel, with a map in pinned memory, which no rehearsal has
        program["arguments"] = {"ddp_find_unused_parameters": False}
    if strategy.startswith("zero"):
        program["arguments"] = {"deepspeed": deepspeed(int(strategy[-1]), zero or {})}
    return {"name": name, "strategy": strategy, "world": world, "program": program, "fsdp": fsdp or {}}


def deepspeed(stage: int, zero: dict[str, Any]) -> dict[str, Any]:
    """A config of DeepSpeed with what transformers fills in left to it."""
    automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    return {
        **dict.fromkeys(automatic, "auto"),
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, **zero},
        "zero_force_ds_cpu_optimizer": False,
    }


def options(row: dict[str, Any]) -> dict[str, Any]:
    """The job as `peftplan.estimate` takes it."""
    program = row["program"]
    if "model" in row:
        rank = {} if program["method"] == "full" else {"r": program["r"]}
        others = {name: value for name, value in program.items() if name != "r"}
        shared = {"gpus": row["world"], "strategy": row["strategy"], "overlap_comm": True}
        return {"model": row["model"], **others, **rank, **shared, **(AUTO if row["strategy"] == "zero3" else {})}
    ours = {
        "method": program["method"],
        "gpus": row["world"],
        **({"deepspeed": config} if (config := program.get("arguments", {}).get("deepspeed")) else {"strategy": row["strategy"]}),
        "seq_len": program.get("seq_len", 512),
        "batch_size": program.get("batch_size", 1),
        "gradient_accumulation_steps": program.get("accumulation", 1),
        "gradient_checkpointing": program.get("checkpointing", True),
        "optim": program.get("optim", "adamw_torch_fused"),
        **({} if program["method"] == "full" else {"r": program.get("r", 16)}),
        **({"dtype": "fp16", "autocast": "fp16"} if program.get("autocast") == "fp16" else {}),
        **({"dp_shard_size": shards} if (shards := program.get("parallel", {}).get("dp_shard_size")) else {}),
        **({"reduce_dtype": "fp32"} if "policy" in program else {}),
        **row["fsdp"],
        **({"zero3_init": False} if row["strategy"] == "zero3" else {}),  # the program makes its model first
    }
    if program["method"] == "qlora":
        tied = {"tie_word_embeddings": True}
        storage = {"bfloat16": "bf16"}.get(program.get("quant_storage", "bfloat16"), "uint8")
        return {"model": LLAMA | tied, **ours, "quant_storage": storage, "kbit_prepare": False}
    if "model" in program:
        return {"model": cut(program["model"], program["layers"]), **ours}
    return {"model": LLAMA | program.get("config", {}), **ours}


def run(names: list[str], *, most: int | None) -> int:
    """Rehearse up to this many jobs without a row; returns how many."""
    from peftplan.rehearse import rehearse

    recorded = {row["name"] for row in rows()}
    count = 0
    for each in jobs():
        if each["name"] in recorded or (names and not any(name in each["name"] for name in names)):
            continue
        if most is not None and count == most:
            break
        count += 1
        result = rehearse(
            command(each),
            gpu=f"{each['world']}x{CARD}",
            world_size=each["world"],
            rank=largest_rank(each),
            timeout=600,
            stdout=os.open(os.devnull, os.O_WRONLY),
        )
        rank = result.largest_rank
        complete = rank is not None and set(PHASES) <= rank.peak_by_phase.keys()
        shown = (
            {"peak_by_phase": rank.peak_by_phase, "peak_reserved": rank.peak_reserved}
            if rank is not None and complete
            else {"error": result.ended}
        )
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({**each, **shown, "seconds": result.seconds, "versions": {n: version(n) for n in LIBRARIES}}) + "\n"
            )
        print(each["name"], shown, file=sys.stderr, flush=True)
    return count


def command(row: dict[str, Any]) -> tuple[str, ...]:
    """The program of a job, with what it is told."""
    if "model" not in row:
        model = {"model": program_words([row["program"]["model"]])[0]} if "model" in row["program"] else {}
        return (sys.executable, str(PROGRAM), json.dumps(row["program"] | model))
    words = [word for name, value in row["program"].items() for word in (f"--{name.replace('_', '-')}", str(value))]
    where = ["--strategy", row["strategy"], "--gpus", str(row["world"])]
    return (sys.executable, str(BUILT_IN), *program_words([row["model"], *words, *where]))


def largest_rank(row: dict[str, Any]) -> int:
    """The rank that the formulas count; the first one where the program quantizes before it knows its device."""
    from peftplan.job.inventory import inventory
    from peftplan.job.prepare import prepare
    from peftplan.memory.zero import largest_rank, slots_of

    if row["strategy"] not in ("zero1", "zero2") or row["program"]["method"] == "qlora":
        return 0
    counted = inventory(prepare(**options(row)))
    assert counted.job.distributed is not None
    return largest_rank(slots_of(counted.parameters, counted.job.distributed))


def rows() -> list[dict[str, Any]]:
    """What was rehearsed."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def compared(row: dict[str, Any]) -> dict[str, float] | None:
    """Signed difference of each phase and of reserved bytes, as a share of the rehearsal's; None without a peak by formula."""
    import peftplan

    result = peftplan.estimate(**options(row), gpu=CARD)
    peaks = result.peaks
    if peaks is None:
        return None
    # a rehearsal's forward begins where the step ends, while gradients are still there; DeepSpeed has freed them
    fused = row["program"].get("optim", "adamw_torch_fused") == "adamw_torch_fused"
    lasting = result.static.bytes() + peaks.ledgers["step"].bytes(["workspaces"])
    after_step = peaks.by_phase["step"] if fused else lasting
    frees = row["strategy"].startswith("zero")
    ours = {**peaks.by_phase, "forward": max(peaks.by_phase["forward"], 0 if frees else after_step)}
    shares = {phase: ours[phase] / row["peak_by_phase"][phase] - 1 for phase in PHASES}
    return {**shares, "reserved": (peaks.reserved or 0) / row["peak_reserved"] - 1}


def table() -> tuple[list[str], str]:
    """The comparison as Markdown, and its summary as a line of Markdown per strategy."""
    lines = ["| job | load | forward | backward | step | reserved |", "| --- | --- | --- | --- | --- | --- |"]
    every: dict[str, dict[str, list[float]]] = {}
    for row in rows():
        if "error" in row:
            continue
        shares = compared(row)
        if shares is None:
            lines.append(f"| {_shown(row['name'])} | – | – | – | – | – |")
            continue
        for what, share in shares.items():
            every.setdefault(row["strategy"], {}).setdefault(what, []).append(share)
        cells = [f"{round(100 * share, 4) + 0.0:+.4f} %" for share in shares.values()]  # no negative zero
        lines.append(f"| {_shown(row['name'])} | {' | '.join(cells)} |")
    summary = []
    for strategy, of_strategy in every.items():
        words = [
            f"{what}: median {100 * median(map(abs, values)):.4f} %, worst {round(100 * max(values, key=abs), 4) + 0.0:+.4f} %"
            for what, values in of_strategy.items()
        ]
        summary.append(f"- {strategy}, {len(of_strategy['load'])} jobs: {'; '.join(words)}.")
    return lines, "\n".join(summary)


def _shown(name: str) -> str:
    """A job's name without the marks of JSON, and without the class that follows from the model type."""
    return re.sub(r', "architectures": \[[^]]*\]', "", name).translate(str.maketrans("", "", '{}"'))


def write() -> None:
    """Put the table into the page."""
    lines, summary = table()
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    PAGE.write_text("\n\n".join([f"{before}{MARKS[0]}", summary, "\n".join(lines), f"{MARKS[1]}{after}"]), encoding="utf-8")
    print(summary)


if __name__ == "__main__":
    if "--run" in sys.argv:
        names = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
        sys.exit(not run(names, most=1 if "--one" in sys.argv else None))
    else:
        write()
