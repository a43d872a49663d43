"""The jobs of FSDP1 and of FSDP2's other parameters and models that tools/rank_jobs.py rehearses."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

SMALL = {"hidden_size": 1000, "intermediate_size": 2730, "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 100}
"""Sizes that no number of ranks divides."""
METHODS = ("full", "lora")
MASTERS = {"param_dtype": "bfloat16", "reduce_dtype": "float32", "output_dtype": "bfloat16"}
"""A policy that reduces gradients in fp32."""
CUT = {
    "gemma-2-2b": 2,
    "gpt2": 12,
    "mixtral-8x7b-v0.1": 2,
    "opt-1.3b": 3,
    "phi-2": 3,
    "gemma-3-1b-pt": 7,
    "qwen3-30b-a3b": 2,
    "bloom-1b1": 3,
    "pythia-1b": 3,
    "falcon-7b": 2,
    "stablelm-2-1-6b": 3,
    "deepseek-v2-lite": 3,
    "olmo-2-0425-1b": 3,
    "gpt-oss-20b": 2,
    "gpt-j-6b": 2,
    "c4ai-command-r7b-12-2024": 4,
    "phi-3-mini-4k-instruct": 3,
    "mpt-7b": 2,
    "starcoder2-3b": 3,
    "qwen1.5-moe-a2.7b": 2,
    "glm-4-9b-0414": 2,
    "granite-3.1-2b-base": 3,
    "starcoder": 2,
    "olmo-1b": 3,
    "smollm3-3b": 4,
    "gemma-2b": 2,
    "aya-23-8b": 2,
}
"""Built-in models of other kinds than Llama, and how many of their layers run."""
CUT_FULL = ("gpt2", "gemma-3-1b-pt", "opt-1.3b", "bloom-1b1", "phi-2", "pythia-1b", "olmo-2-0425-1b", "stablelm-2-1-6b")
"""Those of which all weights are trained too."""
Named = tuple[str, str, int, dict[str, Any]]
"""Strategy, method, ranks, and what else is set."""


def sharded_jobs() -> Iterator[Named]:
    """All of them."""
    yield from fsdp2_jobs()
    yield from fsdp1_jobs()


def fsdp2_jobs() -> Iterator[Named]:
    """Parameters of FSDP2, then models."""
    variants: tuple[dict[str, Any], ...] = (
        {"fsdp": {"offload_params": "cpu"}},
        {"autocast": "fp16"},
        {"parallel": {"dp_replicate_size": 2, "dp_shard_size": 4}},
        {"fsdp": {"sync_each_batch": True}, "accumulation": 3},
        {"policy": MASTERS},
        {"fsdp": {"offload_params": "cpu"}, "accumulation": 2},
        {"parallel": {"dp_replicate_size": 4, "dp_shard_size": 2}, "accumulation": 2},
        {"policy": MASTERS, "accumulation": 2},
    )
    for more, method in product(variants, METHODS):
        yield "fsdp2", method, 8, more
    for model, layers in CUT.items():
        yield "fsdp2", "lora", 4, {"model": model, "layers": layers, "seq_len": 256}
    for model in CUT_FULL:
        yield "fsdp2", "full", 4, {"model": model, "layers": CUT[model], "seq_len": 256}


def fsdp1_jobs() -> Iterator[Named]:
    """Parameters of FSDP1, and numbers of ranks."""
    ahead = {"backward_prefetch": "pre"}
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"fsdp": ahead},
        {"checkpointing": False},
        {"accumulation": 3},
        {"config": {**SMALL, "vocab_size": 50001}},
        {"config": {"tie_word_embeddings": True}, "fsdp": ahead},
        {"optim": "adamw_torch"},
    )
    for more, method in product(variants, METHODS):
        yield "fsdp1", method, 4, more
    for world, method in product((2, 64), METHODS):
        yield "fsdp1", method, world, {"fsdp": ahead}


def cut(name: str, layers: int) -> dict[str, Any]:
    """A built-in model's config with its first layers alone."""
    from peftplan.arch.catalogue import find

    entry = find(name)
    assert entry is not None
    config = dict(entry.facts()["config"])
    config[next(field for field in ("n_layer", "n_layers", "num_hidden_layers") if field in config)] = layers
    return config | ({"layer_types": config["layer_types"][:layers]} if config.get("layer_types") else {})
