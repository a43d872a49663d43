"""Houlsby and Pfeiffer adapters: both engines' peaks, the same refusals, and what an adapter keeps by hand."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate, serving
from peftplan.errors import RefusedError
from tests.memory.engines import BATCH, LLAMA, OFF, PLAIN, TOKENS, TOLERANCE, TRAINER, kept_per_layer, phases, shallow


@pytest.mark.parametrize(
    ("method", "model", "options"),
    [
        ("houlsby", "llama", PLAIN),
        ("pfeiffer", "llama", {**TRAINER, "padding": True}),
        ("houlsby", "llama", {"trainer": "trl", "quant": "nf4", "gradient_checkpointing": False}),
        ("houlsby", "gpt2", {**PLAIN, "dtype": "fp32"}),
        ("pfeiffer", "pythia-14m", OFF),
        ("houlsby", "bloom-560m", {**PLAIN, "bottleneck_size": 24}),
        ("houlsby", "phi-1-5", OFF),
        ("houlsby", "modernbert-base", OFF),
        ("pfeiffer", "lfm2-350m", {**TRAINER, "padding": True}),
    ],
)
def test_each_phase_peaks_where_the_trace_does(method: str, model: str, options: dict[str, Any]) -> None:
    """Load, forward, backward and step."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = LLAMA if model == "llama" else shallow(model)
    analytic, traced = (phases(config, engine, method=method, **options) for engine in ("analytic", "trace"))
    assert analytic == {phase: pytest.approx(nbytes, rel=TOLERANCE) for phase, nbytes in traced.items()}


@pytest.mark.parametrize(
    ("method", "model"),
    [(method, model) for method in ("houlsby", "pfeiffer") for model in ("bert-base-cased", "mt0-small")]
    + [("houlsby", "lfm2-350m")],
)
def test_both_engines_refuse_the_same_layers(method: str, model: str) -> None:
    """BERT's parts have norms of their own, T5's layers hold no part by these names; LFM2's first ones have a convolution."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    reasons = []
    for engine in ("analytic", "trace"):
        with pytest.raises(RefusedError, match="without a norm of its own") as refused:
            estimate(shallow(model, 3), method=method, engine=engine, trainer="plain", seq_len=32)  # type: ignore[arg-type]
        reasons.append(str(refused.value))
    assert reasons[0] == reasons[1]
    assert reasons[0].endswith("`peftplan serve` still counts them")
    assert serving(shallow(model, 2), method=method).to_dict()["serving"]["adapter"] > 0


def test_an_adapter_keeps_its_input_and_its_bottleneck() -> None:
    """The input in the adapter's fp32, and the result of its ReLU, which the second projection keeps too; nothing for the sum."""
    n, h, b = BATCH * TOKENS, 256, 32
    one = 4 * n * h + 4 * n * b
    options = {**PLAIN, "bottleneck_size": b}
    pfeiffer, houlsby = (kept_per_layer(LLAMA, method=method, **options) for method in ("pfeiffer", "houlsby"))
    assert houlsby - pfeiffer == one
