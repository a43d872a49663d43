"""Full fine-tuning: what a fresh model leaves trainable."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.methods import tiny


@pytest.mark.parametrize("model", list(tiny.CONFIGS))
def test_everything_that_the_model_class_leaves_trainable(model: str) -> None:
    found = tiny.ours(model, "full")
    real = [p for p in tiny.real(model).parameters() if p.requires_grad]
    assert found.num_trainable == sum(p.numel() for p in real)
    assert sum(p.copies for p in found.trained) == len(real)
    assert found.num_added == 0


def test_frozen_parameters_stay_frozen() -> None:
    # Whisper's sinusoidal positions are a parameter that its class freezes
    found = tiny.ours("whisper", "full")
    frozen = [n for n, p in tiny.real("whisper").named_parameters() if not p.requires_grad]
    assert frozen
    assert not {f"{p.module}.{p.param}" for p in found.trained} & set(frozen)
