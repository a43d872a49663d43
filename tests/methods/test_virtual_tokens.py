"""Prefix tuning, prompt tuning and p-tuning against peft and hand sums."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import InputError, RefusedError
from tests.methods import tiny
from tests.methods.tiny import assert_like_peft, ours, peft_of

P = 5


def test_hand_sums() -> None:
    # llama: 3 layers, keys and values of 2 heads of 8
    assert ours("llama", "prefix-tuning", num_virtual_tokens=P).num_trainable == P * 3 * 2 * 16
    # projection: (5, 16), 16 → 10, 10 → 3·2·16, with biases
    projected = ours("llama", "prefix-tuning", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=10)
    assert projected.num_trainable == 80 + (16 * 10 + 10) + (10 * 96 + 96)
    assert ours("llama", "prompt-tuning", num_virtual_tokens=P).num_trainable == P * 48
    assert ours("t5", "prompt-tuning", num_virtual_tokens=P).num_trainable == 2 * P * 48  # encoder and decoder
    # three linear layers 48 → 48 with biases
    assert ours("llama", "p-tuning", num_virtual_tokens=P).num_trainable == P * 48 + 3 * (48 * 48 + 48)


MODELS = [m for m in tiny.CONFIGS if m not in ("mpt", "distilbert", "vit")]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("prefix-tuning", {}),
    ("prefix-tuning", {"prefix_projection": True, "encoder_hidden_size": 10}),
    ("prefix-tuning", {"prefix_projection": True, "init_weights": "zero"}),
    ("prompt-tuning", {}),
    ("p-tuning", {}),
    ("p-tuning", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 9, "encoder_num_layers": 3}),
]


@pytest.mark.parametrize("model", MODELS)
def test_prefix_width_is_pefts(model: str) -> None:
    assert_like_peft(model, "prefix-tuning", num_virtual_tokens=P)


@pytest.mark.parametrize(("method", "options"), OPTIONS)
@pytest.mark.parametrize(
    ("model", "task"), [("qwen3", None), ("bert", "SEQ_CLS"), ("t5", None), ("falcon", None), ("gpt2", "SEQ_CLS")]
)
def test_equal_to_peft(model: str, task: str | None, method: str, options: dict[str, Any]) -> None:
    assert_like_peft(model, method, task, num_virtual_tokens=P, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"token_dim": 40, "num_layers": 2},
        {"num_transformer_submodules": 2, "modules_to_save": ["lm_head"]},
        {"num_attention_heads": 3},
    ],
)
@pytest.mark.parametrize("method", ["prefix-tuning", "prompt-tuning", "p-tuning"])
def test_stated_sizes(method: str, options: dict[str, Any]) -> None:
    assert_like_peft("llama", method, num_virtual_tokens=P, **options)


@pytest.mark.parametrize("method", ["prefix-tuning", "prompt-tuning", "p-tuning"])
@pytest.mark.parametrize("model", ["mpt", "distilbert"])
def test_sizes_that_peft_does_not_find(model: str, method: str) -> None:
    with pytest.raises(RefusedError, match="please specify"):
        ours(model, method, num_virtual_tokens=P)
    with pytest.raises(ValueError, match="Please specify"):
        peft_of(model, method, num_virtual_tokens=P)
    assert_like_peft(model, method, num_virtual_tokens=P, num_attention_heads=6, token_dim=48, num_layers=3)


def test_errors() -> None:
    with pytest.raises(InputError, match="num_virtual_tokens"):
        ours("llama", "prompt-tuning")
    with pytest.raises(RefusedError, match="no word embeddings"):
        ours("vit", "prompt-tuning", num_virtual_tokens=P)
