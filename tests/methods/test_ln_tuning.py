"""LN tuning against peft and a hand sum: copies of modules, in the dtype of the base."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.methods.adaptation import NeedsPeftError
from tests.methods.tiny import assert_like_peft, ours


def test_hand_sum() -> None:
    adaptation = ours("llama", "ln-tuning")
    # two norms of 48 in each of three layers, and the last one
    assert adaptation.num_trainable == 3 * 2 * 48 + 48
    assert {t.dtype for t in adaptation.added} == {"base"}


@pytest.mark.parametrize(
    ("model", "task", "options"),
    [
        ("llama", None, {}),
        ("llama", "SEQ_CLS", {}),
        ("gpt2", None, {"target_modules": ["ln_1", "ln_f"], "exclude_modules": ["h.0.ln_1"]}),
        ("bert", "SEQ_CLS", {"target_modules": ["LayerNorm"]}),
        ("t5", None, {"target_modules": ["layer_norm"], "modules_to_save": ["lm_head"]}),
        ("llama", None, {"target_modules": ["embed_tokens", "q_proj"]}),
    ],
)
def test_equal_to_peft(model: str, task: str | None, options: dict[str, Any]) -> None:
    assert_like_peft(model, "ln-tuning", task, **options)


def test_containers_are_left_to_peft() -> None:
    with pytest.raises(NeedsPeftError, match="contain other modules"):
        ours("llama", "ln-tuning", target_modules=["self_attn"])
