"""OFT against peft and a hand sum: blocks, their triangle, and sizes that do not divide."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RefusedError
from peftplan.methods.oft import nearest_divisor
from tests.methods.tiny import assert_like_peft, ours, peft_of


def test_hand_sum() -> None:
    # q: 48 / 16 = 3 blocks of 16·15/2 = 120 entries; three layers
    assert ours("llama", "oft", oft_block_size=16, target_modules=["q_proj"]).num_trainable == 3 * 3 * 120
    assert ours("llama", "oft", oft_block_size=16, block_share=True, target_modules=["q_proj"]).num_trainable == 3 * 120
    # r 4 blocks of 12·11/2 = 66 entries
    assert ours("llama", "oft", r=4, oft_block_size=0, target_modules=["q_proj"]).num_trainable == 3 * 4 * 66


@pytest.mark.parametrize(("wanted", "divisor"), [(32, 24), (7, 6), (5, 4), (36, 24), (40, 48), (48, 48), (100, 48), (1, 1)])
def test_nearest_divisor_of_48(wanted: int, divisor: int) -> None:
    # 1, 2, 3, 4, 6, 8, 12, 16, 24, 48; of two at the same distance the lower
    assert nearest_divisor(48, wanted) == divisor


@pytest.mark.parametrize(
    ("model", "task", "options"),
    [
        ("llama", None, {}),
        ("llama", "SEQ_CLS", {"r": 5, "oft_block_size": 0, "target_modules": "all-linear"}),
        ("llama", None, {"target_modules": ["embed_tokens", "q_proj"], "oft_block_size": 8, "coft": True}),
        ("bert", None, {"target_modules": ["query", "dense"], "oft_block_size": 7, "block_share": True, "bias": "oft_only"}),
        ("t5", None, {"target_modules": "all-linear", "oft_block_size": 36, "use_cayley_neumann": False}),
    ],
)
def test_equal_to_peft(model: str, task: str | None, options: dict[str, Any]) -> None:
    adaptation = assert_like_peft(model, "oft", task, **options)
    adapted = peft_of(model, "oft", task, **options)
    real = sum(b.numel() for n, b in adapted.named_buffers() if n.endswith((".rows", ".cols")))
    assert sum(b.copies * b.shape[0] for b in adaptation.buffers) == real


@pytest.mark.parametrize("options", [{"r": 8}, {"oft_block_size": 0}])
def test_exactly_one_of_two(options: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match="exactly one"):
        ours("llama", "oft", **options)
    with pytest.raises(ValueError, match="oft_block_size"):
        peft_of("llama", "oft", **options)
