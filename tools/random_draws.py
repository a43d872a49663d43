"""Random fine-tuning jobs and random adapter configs, each drawn from a seed and its own number.

The bounds within which sizes are drawn, so that the tolerances mean something (segments are 2 and 20 MiB): hidden states 512 to
4,096 wide, 2 to 6 layers or the built-in model's own depth, vocabularies of 1,000 to 200,000, sequences of 256 to 2,048 tokens
(what the model has positions for), batches of 1 to 8. A draw that the shared checks of a job refuse (`job.prepare`), for
all engines alike, is drawn again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import lcm
from typing import Any, NamedTuple

from peftplan.arch import catalogue
from peftplan.arch.modules import LINEAR_KINDS
from peftplan.errors import PeftplanError
from peftplan.job.kernels import SCANNING
from peftplan.job.prepare import prepare
from peftplan.job.sources import load, load_config
from peftplan.job.tasks import WITH_PAD_TOKEN
from peftplan.memory.models import FORWARDS
from peftplan.optim.names import OPTIMIZERS
from tools.analytic_grid import DRAWN, LAYER_FIELDS, MADE_UP, TASKS, TEXT_OF, whole

Options = dict[str, Any]
Choices = Sequence[tuple[float, Any]]
"""Weights and what they are for."""

WIDTHS = (512, 4096)
FEW_LAYERS = (2, 6)
DEEPEST = 80
VOCAB = (1_000, 200_000)
TOKENS = (256, 2048)
BATCHES = (8, 7, 6, 5, 4, 3, 2, 1, 1, 1)

WIDTH_FIELDS = ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim")
HEAD_FIELDS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip
KEY_VALUE_FIELDS = ("num_key_value_heads", "num_kv_heads")
MLP_FIELDS = (
    "intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim",
    "shared_expert_intermediate_size",
)  # fmt: skip
EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")


class Job(NamedTuple):
    """A model's config and the options of an estimate."""

    config: dict[str, Any]
    options: Options


def draw_job(seed: int, number: int, *, model_types: Sequence[str] = ()) -> Job:
    """Job `number` of a seed; of one of `model_types`, where some are named."""
    draw = random.Random(f"{seed} {number}")
    model_type = draw.choice(tuple(model_types or (name for name in FORWARDS if name not in SCANNING)))
    while True:
        config = draw_config(draw, model_type)
        try:
            job = Job(config, draw_options(draw, config))
            prepare(job.config, **{name: value for name, value in job.options.items() if name != "gpu"})
        except PeftplanError:
            continue
        return job


@cache
def _models(model_type: str) -> tuple[str, ...]:
    return tuple(entry.name for entry in catalogue.models() if load_config(entry.name).get("model_type") == model_type)


def draw_config(draw: random.Random, model_type: str, *, deep: float = 0.25) -> dict[str, Any]:
    """A built-in model's config with other depth, and often with other sizes; `deep`: how often with its own depth."""
    config = whole(model_type if model_type in {**MADE_UP, **TEXT_OF} else draw.choice(_models(model_type)))
    depth = max(config[name] for name in LAYER_FIELDS if isinstance(config.get(name), int))
    if draw.random() >= deep or depth > DEEPEST:
        config = _shallower(config, depth, draw.randint(*FEW_LAYERS))
    if draw.random() < 0.7:
        config |= _sizes(draw, config)
    if draw.random() < 0.15 and "tie_word_embeddings" in config:
        config["tie_word_embeddings"] = not config["tie_word_embeddings"]
    if config.get("sliding_window") and draw.random() < 0.5:
        config["sliding_window"] = draw.choice((128, 300, 512, 1024))
    return config


def _shallower(config: Mapping[str, Any], depth: int, layers: int) -> dict[str, Any]:
    few: dict[str, Any] = {name: min(config[name], layers) for name in LAYER_FIELDS if isinstance(config.get(name), int)}
    lists = {name: value for name, value in config.items() if isinstance(value, list) and len(value) == depth}
    return {**config, **few, **{name: value[:layers] for name, value in lists.items()}}


def _sizes(draw: random.Random, config: Mapping[str, Any]) -> dict[str, Any]:
    """Other widths, heads, MLPs, experts and vocabulary, with the dims of a head as they are: tables of RoPE depend on them."""
    width, heads = _first(config, WIDTH_FIELDS), _first(config, HEAD_FIELDS)
    stated_head_dim = config.get("head_dim") or config.get("d_kv") or config.get("qk_nope_head_dim")
    head_dim = stated_head_dim or width // heads
    low, high = WIDTHS
    heads = draw.choice([n for n in range(2, 65) if low <= n * head_dim <= high])
    step = lcm(64, heads)  # transformers asks for a width that the heads divide, whatever they measure
    width = step * draw.randint(-(-low // step), high // step) if stated_head_dim else heads * head_dim
    pairs = [n for n in range(1, heads + 1) if heads % n == 0]
    key_values = heads if config.get("kv_lora_rank") else draw.choice(pairs)
    mlp = 32 * draw.randint(width // 32, 5 * width // 32)
    sizes = dict.fromkeys(WIDTH_FIELDS, width) | dict.fromkeys(HEAD_FIELDS, heads) | dict.fromkeys(MLP_FIELDS, mlp)
    sizes |= dict.fromkeys(KEY_VALUE_FIELDS, key_values) | {"moe_intermediate_size": 32 * draw.randint(8, 64)}
    groups = config.get("n_group") or 1
    experts = groups * draw.choice((2, 4)) if groups > 1 else draw.choice((4, 6, 8, 16))
    sizes |= dict.fromkeys(EXPERT_FIELDS, experts) | {"num_experts_per_tok": draw.randint(1, min(4, experts))}
    padded = config.get("pad_token_id") is not None or config["model_type"] not in (*WITH_PAD_TOKEN, "modernbert")
    if draw.random() < 0.6 and padded:  # a default of its class may lie beyond a smaller vocabulary
        used = _used_ids(config)
        sizes["vocab_size"] = draw.randint(max(VOCAB[0], used), max(VOCAB[1], used))
    stated_sizes = {name: value for name, value in sizes.items() if isinstance(config.get(name), int)}
    return stated_sizes | ({"hidden_dim": mlp} if config["model_type"] == "distilbert" else {})


def _used_ids(config: Mapping[str, Any]) -> int:
    """The least vocabulary that has the padding and other special tokens: those stated, else the defaults of the class."""
    defaults = SPECIAL_IDS.get(config["model_type"], {})
    ids = [config.get(f"{name}_token_id", defaults.get(name)) for name in ("pad", "bos", "eos", "decoder_start")]
    return max((value for value in ids if isinstance(value, int)), default=-1) + 1


SPECIAL_IDS = {"whisper": {"pad": 50256, "bos": 50256, "eos": 50256, "decoder_start": 50257}}
"""Model type → ids of special tokens that a config need not state (transformers, `WhisperConfig`)."""


def _first(config: Mapping[str, Any], names: Sequence[str]) -> int:
    return next(config[name] for name in names if isinstance(config.get(name), int))


def _one(draw: random.Random, choices: Choices) -> Any:
    weights, values = zip(*choices, strict=True)
    return draw.choices(values, weights)[0]


TRAINERS: Choices = (
    (4, {}),
    (3, {"trainer": "plain"}),
    (2, {"trainer": "trl"}),
    (1, {"trainer": "qlora-paper"}),
)
PRECISIONS: Choices = (
    (5, {}),
    (1, {"dtype": "fp32", "autocast": "none"}),
    (1, {"dtype": "fp32"}),
    (1, {"dtype": "fp16", "autocast": "fp16"}),
    (0.5, {"dtype": "fp32", "autocast": "fp16"}),
    (1, {"dtype": "bf16", "autocast": "none"}),
    (0.5, {"dtype": "fp16", "autocast": "none"}),
    (0.3, {"adapter_dtype": "bf16"}),
)
ON: Options = {"gradient_checkpointing": True}
CHECKPOINTING: Choices = (
    (4, {}),
    (2, ON),
    (2, {"gradient_checkpointing": False}),
    (0.7, {**ON, "use_reentrant": True}),
    (0.7, {**ON, "every_n_layers": 2}),
    (0.5, {**ON, "every_n_layers": 3}),
    (0.6, {**ON, "offload_checkpoints": True}),
    (0.3, {**ON, "offload_checkpoints": True, "use_reentrant": True}),
    (0.3, {**ON, "every_n_layers": 2, "offload_checkpoints": True}),
)
ATTENTIONS: Choices = (
    (4, {}),
    (2, {"attn_implementation": "sdpa"}),
    (2, {"attn_implementation": "eager"}),
    (2, {"attn_implementation": "flash_attention_2"}),
)
QUANTS: Choices = (
    (8, {}),
    (1, {"quant": "nf4"}),
    (1, {"quant": "nf4", "double_quant": True, "compute_dtype": "bf16"}),
    (0.3, {"quant": "fp4", "compute_dtype": "fp16"}),
    (0.3, {"quant": "nf4", "compute_dtype": "fp32"}),
    (1, {"quant": "int8"}),
)
LOSSES: Choices = (
    (8, {}),
    (1, {"loss": "full"}),
    (1, {"loss": "liger"}),
    (0.5, {"loss": "unsloth"}),
    (0.5, {"loss": "trl-chunked"}),
    (1, {"logits_to_keep": 1}),
    (0.5, {"logits_to_keep": 64}),
    (0.3, {"loss": "liger", "logits_to_keep": 16}),
)
RARE: Sequence[tuple[float, Options]] = (
    (0.25, {"padding": True}),
    (0.1, {"keep_gradients": True}),
    (0.1, {"keep_outputs": False}),
    (0.1, {"use_cache": False}),
    (0.1, {"kbit_prepare": False}),
    (0.12, {"gradient_accumulation_steps": 4}),
    (0.08, {"gradient_accumulation_steps": 2}),
)
"""How often each is set."""
CARDS: Choices = ((5, {}), *((1, {"gpu": name}) for name in ("t4", "l4", "a100-40gb", "h100-80gb", "rtx-5090", "rtx-a6000")))
TRACED_OPTIMIZERS = sorted(name for name, optimizer in OPTIMIZERS.items() if not optimizer.untraced)
"""Optimizers that step inside backward have no step that either engine knows, and are left out."""
LORAS = ("lora", "qlora", "dora", "qdora", "rslora", "lora-fa", "lora+")
METHOD_CHOICES: Choices = ((30, "lora"), (15, "qlora"), (10, "full"), (6, "dora"), *((2, name) for name in DRAWN))
RANKS = (1, 4, 8, 16, 16, 32, 64, 128, 256)
PROMPTS = ("prefix-tuning", "prompt-tuning", "p-tuning")


def draw_options(draw: random.Random, config: Mapping[str, Any]) -> Options:
    """The options of a job on this model."""
    options: Options = {}
    for axis in (TRAINERS, PRECISIONS, CHECKPOINTING, ATTENTIONS, QUANTS, LOSSES, CARDS):
        options |= _one(draw, axis)
    for often, option in RARE:
        options |= option if draw.random() < often else {}
    if draw.random() < 0.4:
        options["optim"] = draw.choice(TRACED_OPTIMIZERS)
        if OPTIMIZERS[options["optim"]].low_rank:
            options["optim_target_modules"] = ["attn", "mlp"]
    options |= draw.choice(TASKS.get(config["model_type"], ({},)))
    longest = min(config.get(name, TOKENS[1]) for name in ("max_position_embeddings", "n_positions", "max_target_positions"))
    usual = [tokens for tokens in (256, 300, 512, 1000, 1024, 2048) if tokens <= longest]
    options["seq_len"] = draw.choice([*usual, draw.randint(min(TOKENS[0], longest), min(TOKENS[1], longest))])
    options["batch_size"] = draw.choice(BATCHES)
    method = _one(draw, METHOD_CHOICES)
    return options | {"method": method} | draw_method(draw, method, config, options.get("task_type"))


def draw_method(draw: random.Random, method: str, config: Mapping[str, Any], task: str | None) -> Options:
    """peft's own fields."""
    if method in PROMPTS:
        return {"num_virtual_tokens": draw.choice((1, 8, 20, 64))}
    options: Options = {}
    if method in LORAS and draw.random() < 0.7:
        options["r"] = draw.choice(RANKS)
    if method in (*LORAS, "adalora") and draw.random() < 0.25:
        options["lora_dropout"] = 0.05
    if method in ("full", "bitfit", "houlsby", "pfeiffer"):
        return options
    leaves, whole = _leaves(config, task)
    ways: Choices = ((5, {}), (2, "all-linear"), (2, "attention"), (1, "mlp"), (2, "peft-default"), (3, "some"))
    targets = _one(draw, ways)
    if targets == "some":
        options["target_modules"] = sorted(draw.sample(leaves, draw.randint(1, min(4, len(leaves)))))
    elif targets and method != "ln-tuning":
        options["target_modules"] = targets
    if targets == "some" and method not in ("ia3", "ln-tuning") and draw.random() < 0.4:
        layers = max(config[name] for name in LAYER_FIELDS if isinstance(config.get(name), int))
        options["layers_to_transform"] = sorted(draw.sample(range(layers), draw.randint(1, layers)))
    return options | _rarely(draw, method, leaves, whole)


def _rarely(draw: random.Random, method: str, leaves: Sequence[str], whole: Sequence[str]) -> Options:
    """Fields of a method that few people set."""
    options: Options = {}
    if draw.random() < 0.1:
        options["modules_to_save"] = [draw.choice(whole)]
    if method not in LORAS:
        return options
    rare: dict[str, Callable[[], Any]] = {
        "rank_pattern": lambda: {draw.choice(leaves): draw.choice(RANKS)},
        "bias": lambda: draw.choice(("all", "lora_only")),
        "lora_bias": lambda: True,
        "trainable_token_indices": lambda: sorted(draw.sample(range(1000), draw.randint(1, 5))),
    }
    for name, value in rare.items():
        if draw.random() < 0.07:
            options[name] = value()
    return options


def _leaves(config: Mapping[str, Any], task: str | None) -> tuple[list[str], list[str]]:
    """The names of a model's linear layers; those of its head and embeddings."""
    modules = load(dict(config), task_type=task).modules
    leaves = {m.name.rpartition(".")[2] for m in modules if m.kind in LINEAR_KINDS and "{}" in m.name}
    whole = {m.name.rpartition(".")[2] for m in modules if m.kind in (*LINEAR_KINDS, "Embedding") and "{}" not in m.name}
    return sorted(leaves), sorted(whole - leaves)
