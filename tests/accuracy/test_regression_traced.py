"""The regression of the trace engine on a seeded sample: seconds per record."""

from __future__ import annotations

import pytest

from peftplan.accuracy import baseline as stored
from peftplan.accuracy import regression

SEED, SAMPLE = 1, 4


def test_a_sample_traced() -> None:
    """Without the libraries of the baseline only the tolerances count."""
    pytest.importorskip("bitsandbytes")
    result = regression.run([], engine="trace", sample=SAMPLE, seed=SEED)
    same = stored.load(stored.BASELINE).versions["trace"] == regression.versions("trace")
    failures = [failure.text("trace") for failure in result.failures if same or failure.kind != "baseline"]
    assert failures == []
    assert all(answer.compared or answer.record.run.strategy for answer in result.answers)  # QLoRA under FSDP1 has no trace
