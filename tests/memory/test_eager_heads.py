"""Eager attention over more than one sequence: which heads `matmul` copies, and what the first layer's input outlives."""

from __future__ import annotations

from typing import Any

import pytest

from tests.memory.engines import OFF, PLAIN, TRAINER, phases

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "vocab_size": 500,
}
ONE_HEAD = {**SIZES, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 32}
PARTLY_ROTATED = {**SIZES, "model_type": "gpt_neox", "rotary_pct": 0.25}
BIGCODE: dict[str, Any] = {
    "model_type": "gpt_bigcode",
    "n_embd": 256,
    "n_head": 8,
    "n_layer": 4,
    "n_inner": 512,
    "n_positions": 512,
    "vocab_size": 500,
    "multi_query": True,
}
GPT2 = {name: value for name, value in BIGCODE.items() if name != "multi_query"} | {"model_type": "gpt2"}
CHECKPOINTED = {"gradient_checkpointing": True}
PROMPTS = {"num_virtual_tokens": 8}
CLOSE = 0.002
"""Small integers (labels, positions) and fp32 statistics of norms, which a CPU keeps in bf16."""


@pytest.mark.parametrize(
    ("config", "method", "options"),
    [
        (ONE_HEAD, "full", {**PLAIN, **CHECKPOINTED, "dtype": "fp32", "autocast": "bf16"}),
        (BIGCODE, "lora", {**TRAINER, **CHECKPOINTED}),
        (BIGCODE, "full", {**OFF, "dtype": "fp32", "autocast": "none"}),
        (PARTLY_ROTATED, "prompt-tuning", {**OFF, **PROMPTS}),
        (GPT2, "lora", OFF),
        (GPT2, "prompt-tuning", {**OFF, **PROMPTS, "dtype": "fp32", "autocast": "bf16"}),
    ],
)
def test_each_phase_peaks_where_the_trace_does(config: dict[str, Any], method: str, options: dict[str, Any]) -> None:
    """Load, forward, backward and step."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    job = {"attn_implementation": "eager", **options}
    analytic, traced = (phases(config, engine, method=method, **job) for engine in ("analytic", "trace"))
    assert analytic == {phase: pytest.approx(nbytes, rel=CLOSE) for phase, nbytes in traced.items()}
