"""LoKr against peft and a hand sum: which factor stays whole, and how widths are split."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.methods.lokr import factorization
from tests.methods.tiny import assert_like_peft, ours


def test_hand_sum() -> None:
    # q: 48 = 6·8 twice; r 2 < 8/2, so W1 (6, 6) and W2 (8, 2)·(2, 8): 36 + 16 + 16; three layers
    assert ours("llama", "lokr", r=2, target_modules=["q_proj"]).num_trainable == 3 * (36 + 16 + 16)
    # r 4 = 8/2: W2 whole (8, 8)
    assert ours("llama", "lokr", r=4, target_modules=["q_proj"]).num_trainable == 3 * (36 + 64)
    # both factors split: W1 (6, 2)·(2, 6)
    assert ours("llama", "lokr", r=2, decompose_both=True, target_modules=["q_proj"]).num_trainable == 3 * (12 + 12 + 16 + 16)


@pytest.mark.parametrize("factor", [-1, 0, 2, 4, 5, 7, 16, 200])
def test_factorization_is_pefts(factor: int) -> None:
    from peft.tuners.lokr.layer import factorization as pefts

    for width in (1, 2, 16, 36, 48, 80, 97, 128, 360, 3072, 14336):
        assert factorization(width, factor) == pefts(width, factor), width


@pytest.mark.parametrize(
    ("model", "task", "options"),
    [
        ("llama", None, {}),
        ("llama", None, {"r": 2, "decompose_both": True, "target_modules": "all-linear"}),
        ("llama", None, {"r": 3, "decompose_factor": 4, "target_modules": "all-linear", "rank_pattern": {"up_proj": 40}}),
        ("bert", "SEQ_CLS", {"r": 3, "decompose_factor": 7, "decompose_both": True, "target_modules": ["query", "dense"]}),
        ("t5", None, {"target_modules": "all-linear", "init_weights": "lycoris"}),
    ],
)
def test_equal_to_peft(model: str, task: str | None, options: dict[str, Any]) -> None:
    assert_like_peft(model, "lokr", task, **options)
