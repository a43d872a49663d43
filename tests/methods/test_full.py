"""Full fine-tuning: what trains in a model that `from_pretrained` has loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

from tests.methods import tiny  # noqa: E402


@pytest.mark.parametrize("model", list(tiny.CONFIGS))
def test_every_parameter_trains(model: str) -> None:
    adaptation = tiny.ours(model, "full")
    real = list(tiny.real(model).parameters())
    assert adaptation.num_trainable == sum(p.numel() for p in real)
    assert sum(p.copies for p in adaptation.trained) == len(real)
    assert adaptation.num_added == 0


def test_loading_trains_what_the_class_creates_frozen(tmp_path: Path) -> None:
    # Whisper's sinusoidal positions are a parameter that its class freezes; a loaded one trains
    model = tiny.real("whisper", device="cpu")
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"model.encoder.embed_positions.weight"}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    ours = tiny.ours("whisper", "full").trained
    trained = {f"{p.module}.{p.param}".replace("{}", str(i)) for p in ours for i in p.layers or (0,)}
    assert trained == {n for n, p in loaded.named_parameters() if p.requires_grad}
