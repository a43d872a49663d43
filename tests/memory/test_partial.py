"""Only named parameters train: both engines' peaks, and that backward stops where nothing below it trains."""

from __future__ import annotations

from typing import Any

import pytest

from tests.memory.engines import BATCH, LLAMA, OFF, PLAIN, TOKENS, TOLERANCE, TRAINER, phases, shallow

KINDS: list[dict[str, Any]] = [
    {"trainable_layers": 1},
    {"trainable_layers": -1},
    {"trainable": ["norm"]},
    {"trainable": [r"\.{layers}\.self_attn", "embed_tokens"], "trainable_layers": 1},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("model", "options"), [("llama", PLAIN), ("llama", TRAINER), ("qwen2.5-0.5b", OFF)])
def test_each_phase_peaks_where_the_trace_does(kind: dict[str, Any], model: str, options: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    config = LLAMA if model == "llama" else shallow(model)
    analytic, traced = (phases(config, engine, method="partial", **kind, **options) for engine in ("analytic", "trace"))
    assert analytic == {phase: pytest.approx(nbytes, rel=TOLERANCE) for phase, nbytes in traced.items()}


def test_nothing_is_kept_below_the_first_layer_that_trains() -> None:
    """Without checkpoints a layer more below, with frozen weights, costs its weights alone."""
    one, two = (
        phases(shallow("qwen2.5-0.5b", layers), "analytic", method="partial", trainable_layers=1, **OFF) for layers in (4, 5)
    )
    h, i, kv = 896, 4864, 128
    layer = 2 * h * h + 2 * kv * h + 3 * h * i + h + 2 * kv + 2 * h
    assert two["backward"] - one["backward"] == pytest.approx(2 * layer, abs=2**14)
    assert BATCH * TOKENS > 0
