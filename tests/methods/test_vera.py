"""VeRA against peft and a hand sum, its shared buffers included."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import InputError, RefusedError
from peftplan.methods.adaptation import AddedBuffer
from tests.methods.tiny import assert_like_peft, ours, peft_of


def test_hand_sum() -> None:
    adaptation = ours("llama", "vera", r=7, target_modules=["q_proj", "down_proj"])
    # per layer: q 48 + 7, down 48 + 7
    assert adaptation.num_trainable == 3 * (55 + 55)
    # the widest input is down's 80, the widest output 48
    assert adaptation.buffers == (AddedBuffer("vera_A", (7, 80), "adapter"), AddedBuffer("vera_B", (48, 7), "adapter"))


@pytest.mark.parametrize("options", [{}, {"r": 5, "target_modules": "all-linear"}])
def test_buffers_are_pefts(options: dict[str, Any]) -> None:
    real = {tuple(b.shape) for n, b in peft_of("llama", "vera", device="cpu", **options).named_buffers() if ".vera_" in n}
    assert {b.shape for b in ours("llama", "vera", **options).buffers} == real


@pytest.mark.parametrize(
    ("model", "task", "options"),
    [
        ("llama", None, {}),
        ("gpt2", None, {"target_modules": ["c_attn", "c_proj"], "bias": "vera_only", "save_projection": False}),
        ("bert", "SEQ_CLS", {"r": 16, "target_modules": ["query", "dense"], "modules_to_save": ["pooler"], "bias": "all"}),
        ("phi", None, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "d_initial": 0.5}),
    ],
)
def test_equal_to_peft(model: str, task: str | None, options: dict[str, Any]) -> None:
    assert_like_peft(model, "vera", task, device="cpu", **options)


def test_embedding_is_refused_by_both() -> None:
    with pytest.raises(RefusedError, match="is of class Embedding"):
        ours("llama", "vera", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises((TypeError, ValueError, AttributeError)):
        peft_of("llama", "vera", device="cpu", target_modules=["q_proj", "embed_tokens"])


def test_has_no_exclude_modules() -> None:
    with pytest.raises(InputError, match="exclude_modules"):
        ours("llama", "vera", exclude_modules=["q_proj"])
