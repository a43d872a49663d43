"""Both engines against torch's own allocator: what it counted of `peftplan measure` on an emulated card (docs/rehearse.md).

Not counted, and so the limits: buffers of reductions of whole batches (trained norms and biases, 10 MB at most), the split
accumulators of flash attention where the batch is too small for the card (gemma-3-270m), weight norms while DoRA is loaded,
TRL's cast of fp32 adapters there, and the batch, which `measure` has on the card before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftplan.accuracy.engines import ask, read_cases
from peftplan.accuracy.records import Record
from peftplan.job.setup import Engine

RECORDS = [case.record for case in read_cases([Path(__file__).parent / "data" / "emulated_card.jsonl"])]
LIMITS = {"load": 0.05, "forward": 0.05, "backward": 0.05, "step": 0.4, "reserved": 0.5}
"""Percent."""
DORA = {"load": 2.5, "reserved": 0.7}
TRL = {"load": 3.2}
SCORES = {"load": 0.25}
"""Of 13 MiB: t5-small with two layers, a narrow feed-forward and few tokens, whose peak is the gradient of its positions."""
TRACED = ("t5-small-full", "smollm2-135m-qlora", "bert-base-uncased-full", "gpt2-lora", "smollm2-135m-lokr", "t5-wide-scores")
"""Kinds of records that are traced here: seconds each."""


def drifts(record: Record, engine: Engine) -> dict[str, float]:
    figures: Any = ask(record, engine).figures
    measured = {phase: peak.allocated for phase, peak in record.peaks.by_phase.items()}
    measured["reserved"] = record.peaks.overall.reserved
    return {name: 100 * (figures[name] / measured[name] - 1) for name in LIMITS if name in figures}


def more(record: Record) -> dict[str, float]:
    """Wider limits of a record."""
    return DORA if "dora" in record.id else SCORES if "scores" in record.id else {}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id.rpartition("-")[0])
def test_formulas(record: Record) -> None:
    limits = LIMITS | more(record) | (TRL if record.run.options["trainer"] == "trl" else {})
    assert {name: drift for name, drift in drifts(record, "analytic").items() if abs(drift) > limits[name]} == {}


@pytest.mark.parametrize(
    "record", [r for r in RECORDS if r.id.startswith(TRACED)], ids=lambda record: record.id.rpartition("-")[0]
)
def test_traces(record: Record) -> None:
    pytest.importorskip("peft")
    by_figure = drifts(record, "trace")
    assert by_figure.keys() == LIMITS.keys()
    limits = dict.fromkeys(LIMITS, 0.05) | more(record)
    assert {name: drift for name, drift in by_figure.items() if abs(drift) > limits[name]} == {}
