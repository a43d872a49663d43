"""BOFT against peft and a hand sum; the butterfly needs peft's CUDA extension, which a stand-in replaces."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from unittest.mock import patch

from peftplan.errors import RefusedError
from tests.methods.tiny import assert_like_peft, ours, peft_of


def test_hand_sum() -> None:
    adaptation = ours("llama", "boft", boft_block_size=8, target_modules=["q_proj"])
    # 48 / 8 = 6 blocks of 8·8, and 48 scales; three layers
    assert adaptation.num_trainable == 3 * (6 * 64 + 48)
    (permutation,) = adaptation.buffers
    assert (permutation.shape, permutation.dtype, permutation.copies) == ((1, 48, 48), "float32", 3)


@pytest.mark.parametrize(
    ("model", "task", "options"),
    [
        ("llama", None, {}),
        ("llama", None, {"boft_block_size": 0, "boft_block_num": 4, "target_modules": "all-linear"}),
        ("bert", "SEQ_CLS", {"target_modules": ["query", "dense"], "boft_block_size": 2, "bias": "boft_only"}),
    ],
)
def test_equal_to_peft(model: str, task: str | None, options: dict[str, Any]) -> None:
    if model == "bert":
        options = options | {"modules_to_save": ["pooler"]}
    assert_like_peft(model, "boft", task, device="cpu", **options)


@pytest.mark.parametrize("options", [{"boft_block_size": 4}, {"boft_block_size": 0, "boft_block_num": 8}])
@pytest.mark.parametrize("factors", [2, 3])
def test_butterfly(options: dict[str, Any], factors: int) -> None:
    chosen = {"target_modules": ["q_proj", "down_proj"], "boft_n_butterfly_factor": factors, **options}
    with patch("peft.tuners.boft.layer.get_fbd_cuda", object):
        adaptation = assert_like_peft("llama", "boft", device="cpu", **chosen)
    assert "sets the factor to 1" in adaptation.notes[0]


@pytest.mark.parametrize(
    "options",
    [
        {"boft_block_size": 4, "boft_block_num": 4},
        {"boft_block_size": 0},
        {"boft_block_size": 7},
        {"boft_block_size": 0, "boft_block_num": 7},
        {"boft_block_size": 16, "boft_n_butterfly_factor": 2},
        {"boft_block_size": 3, "boft_n_butterfly_factor": 2},
        {"boft_block_size": 4, "boft_n_butterfly_factor": 4},
        {"boft_block_size": 0, "boft_block_num": 3, "boft_n_butterfly_factor": 2},
    ],
)
def test_refused_by_both(options: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        ours("llama", "boft", target_modules=["q_proj"], **options)
    with patch("peft.tuners.boft.layer.get_fbd_cuda", object), pytest.raises(ValueError, match="boft_"):
        peft_of("llama", "boft", device="cpu", target_modules=["q_proj"], **options)
