"""(IA)³ against peft and a hand sum: which layers count as feed-forward."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RefusedError
from tests.methods.tiny import assert_like_peft, ours, peft_of


def test_hand_sum() -> None:
    # per layer: k 16 and v 16 by output, down 80 by input
    assert ours("llama", "ia3").num_trainable == 3 * (16 + 16 + 80)


@pytest.mark.parametrize(
    ("model", "task", "options"),
    [
        ("llama", None, {}),
        (
            "llama",
            None,
            {"target_modules": "all-linear", "feedforward_modules": ["up_proj", "o_proj"], "exclude_modules": ["k_proj"]},
        ),
        ("llama", None, {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": r".*layers\.1\..*"}),
        ("llama", None, {"target_modules": ["q_proj"], "feedforward_modules": []}),
        ("gpt2", None, {}),
        ("bloom", None, {}),
        ("opt", None, {}),
        ("bert", "SEQ_CLS", {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]}),
        ("roberta", "SEQ_CLS", {}),
        ("t5", None, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_equal_to_peft(model: str, task: str | None, options: dict[str, Any]) -> None:
    assert_like_peft(model, "ia3", task, **options)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {"target_modules": ["q_proj"], "feedforward_modules": ["up_proj"]}),
        ("distilbert", {"target_modules": ["q_lin"]}),
        ("distilbert", {"feedforward_modules": ["lin2"]}),
    ],
)
def test_refused_by_both(model: str, options: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        ours(model, "ia3", **options)
    with pytest.raises(ValueError, match=r"feedforward_modules|target_modules"):
        peft_of(model, "ia3", **options)
