"""Jobs drawn from a seed, for round trips through the configs of other tools."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import peftplan
from peftplan.errors import PeftplanError
from peftplan.planning.export import Exported, export
from peftplan.results.estimate import Estimate

MODELS = (
    *("qwen2.5-0.5b", "llama-3.2-1b", "llama-3.1-8b", "mistral-7b-v0.1", "gemma-2-2b", "qwen2.5-7b", "llama-2-13b"),
    *("qwen2.5-3b", "llama-3.3-70b-instruct", "phi-4", "llama-3.2-3b"),
)
TARGETS = (None, ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear", "attention")
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd", "adafactor")
STRATEGIES: tuple[dict[str, Any], ...] = (
    *({},) * 6,
    {"gpus": 4},
    {"gpus": 8, "strategy": "fsdp2"},
    {"gpus": 2, "strategy": "fsdp2", "reshard_after_forward": False},
    {"gpus": 4, "nodes": 2, "strategy": "fsdp2"},
    {"gpus": 8, "strategy": "zero2"},
    {"gpus": 4, "strategy": "zero3"},
    {"gpus": 8, "strategy": "zero3", "offload_params": "cpu", "offload_optimizer": "cpu"},
    {"gpus": 8, "strategy": "fsdp1"},
)
TOOLS = ("axolotl", "llamafactory", "trl", "trl-script", "torchtune", "ms-swift", "accelerate", "deepspeed")
FITTING: dict[str, dict[str, tuple[Any, ...]]] = {
    "torchtune": {
        "models": tuple(name for name in MODELS if name.startswith(("llama", "mistral", "gemma"))),
        "strategies": tuple(each for each in STRATEGIES if each.get("strategy", "fsdp2") == "fsdp2" and each != {"gpus": 4}),
    },
    "deepspeed": {"strategies": tuple(each for each in STRATEGIES if str(each.get("strategy")).startswith("zero"))},
}
"""What is drawn for a tool that has no models or strategies but these."""
LACKS = {"torchtune": ("use_reentrant", "modules_to_save", "attn_implementation")}
"""Options that a tool has no key for; without them fewer draws are refused."""
SEED, PLANS, MOST_DRAWS = 18, 20, 400


class Trip(NamedTuple):
    """A job that was exported: the options, its estimate, and the config."""

    model: str
    options: dict[str, Any]
    estimate: Estimate
    exported: Exported


class Refusal(NamedTuple):
    """A job that was not: `option` is what the error names, None where estimate itself refuses it."""

    option: str | None
    error: str


def draw(
    rng: random.Random, *, models: tuple[str, ...] = MODELS, strategies: tuple[dict[str, Any], ...] = STRATEGIES
) -> tuple[str, dict[str, Any]]:
    """A model and options; about half of all options are left to the trainer."""
    method = rng.choice(("lora", "lora", "qlora", "qlora", "full", "dora"))
    options: dict[str, Any] = {
        "method": method,
        "seq_len": rng.choice((512, 1000, 2048, 4096)),
        "batch_size": rng.choice((1, 2, 3, 8)),
    }
    if method != "full":
        options |= {"r": rng.choice((4, 8, 16, 64)), "target_modules": rng.choice(TARGETS)}
        options |= {"lora_dropout": 0.05} if rng.random() < 0.4 else {}
        options |= {"lora_alpha": rng.choice((16, 32))} if rng.random() < 0.5 else {}
        options |= {"modules_to_save": ["lm_head"]} if rng.random() < 0.1 else {}
    if method == "lora" and rng.random() < 0.2:
        options["quant"] = "int8"
    for name, values in {
        "gradient_accumulation_steps": (2, 8),
        "gradient_checkpointing": (True, False),
        "optim": OPTIMIZERS,
        "attn_implementation": ("sdpa", "flash_attention_2", "eager"),
        "kbit_prepare": (False,),
        "use_reentrant": (True,),
    }.items():
        if rng.random() < 0.4 and (name != "kbit_prepare" or method == "qlora"):
            options[name] = rng.choice(values)
    return rng.choice(models), {**options, **rng.choice(strategies)}


def trips(tool: str, *, seed: int = SEED, plans: int = PLANS) -> Iterator[Trip | Refusal]:
    """Drawn jobs until so many were exported, those that are refused among them."""
    rng = random.Random(f"{seed} {tool}")
    done = 0
    for _ in range(MOST_DRAWS):
        model, options = draw(rng, **FITTING.get(tool, {}))
        options = {name: value for name, value in options.items() if name not in LACKS.get(tool, ())}
        try:
            estimate = peftplan.estimate(model, **options)
        except PeftplanError as error:
            yield Refusal(None, str(error))
            continue
        try:
            exported = export(estimate, to=tool)  # type: ignore[arg-type]
        except PeftplanError as error:
            yield Refusal(str(error).partition(":")[0], str(error))
            continue
        done += 1
        yield Trip(model, options, estimate, exported)
        if done == plans:
            return
