"""FourierFT against peft and a hand sum."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RefusedError
from tests.methods.tiny import assert_like_peft, ours, peft_of


def test_hand_sum() -> None:
    # one spectrum of 10 per module: two modules, three layers
    assert ours("llama", "fourierft", n_frequency=10, target_modules=["q_proj", "v_proj"]).num_trainable == 3 * 2 * 10


@pytest.mark.parametrize(
    ("model", "task", "options"),
    [
        ("llama", None, {"n_frequency": 100}),
        ("llama", None, {"n_frequency": 9, "target_modules": "all-linear",
                         "n_frequency_pattern": {"layers.1.self_attn.q_proj": 3, "up_proj": 4, "model.layers.0.mlp.o": 5}}),
        ("gpt2", None, {"target_modules": ["c_attn"], "bias": "fourier_only"}),
        ("bert", "SEQ_CLS", {"target_modules": ["query"], "layers_to_transform": [2], "bias": "all"}),
    ],
)  # fmt: skip
def test_equal_to_peft(model: str, task: str | None, options: dict[str, Any]) -> None:
    assert_like_peft(model, "fourierft", task, **options)


@pytest.mark.parametrize(
    "options",
    [{"n_frequency": 16 * 48 + 1, "target_modules": ["v_proj"]}, {"target_modules": "all-linear", "layers_to_transform": [0]}],
)
def test_refused_by_both(options: dict[str, Any]) -> None:
    with pytest.raises(RefusedError):
        ours("llama", "fourierft", **options)
    with pytest.raises(ValueError, match=r"n_frequency|layers_to_transform"):
        peft_of("llama", "fourierft", **options)


def test_the_most_frequencies() -> None:
    assert_like_peft("llama", "fourierft", n_frequency=16 * 48, target_modules=["v_proj"])
