"""LoHa against peft and a hand sum."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RefusedError
from peftplan.methods.adaptation import NeedsPeftError
from tests.methods.tiny import assert_like_peft, ours, peft_of


def test_hand_sum() -> None:
    # q 2·4·(48 + 48) = 768, down 2·4·(80 + 48) = 1024; three layers
    assert ours("llama", "loha", r=4, target_modules=["q_proj", "down_proj"]).num_trainable == 3 * (768 + 1024)


@pytest.mark.parametrize(
    ("model", "task", "options"),
    [
        ("llama", None, {}),
        ("llama", "SEQ_CLS", {"r": 4, "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "target_modules": "all-linear"}),
        ("bert", "TOKEN_CLS", {"target_modules": ["query", "output.dense"], "rank_dropout": 0.5, "module_dropout": 0.1}),
        ("t5", None, {"target_modules": r"encoder\..*\.(q|v)"}),
        ("phi", None, {"target_modules": "all-linear", "layers_to_transform": [1]}),
    ],
)
def test_equal_to_peft(model: str, task: str | None, options: dict[str, Any]) -> None:
    assert_like_peft(model, "loha", task, **options)


def test_conv1d_is_refused_by_both() -> None:
    with pytest.raises(RefusedError, match="is of class Conv1D"):
        ours("gpt2", "loha", target_modules=["c_attn"])
    with pytest.raises(TypeError, match="not supported"):
        peft_of("gpt2", "loha", target_modules=["c_attn"])


def test_convolutions_are_left_to_peft() -> None:
    with pytest.raises(NeedsPeftError, match="Conv2d"):
        ours("vit", "loha", target_modules=["projection"])
