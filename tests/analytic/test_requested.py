"""What the formulas add up is what their events allocate: in segments that grow no block has a tail, so that the two are equal.

A ledger that lacks a tensor would have it among the tails of blocks, where nobody looks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftplan import estimate
from peftplan.analytic.instant import InstantPeaks
from peftplan.job.script import NO_SCRIPT
from tools.rehearsed_jobs import LOOP, job_of, read

FILES = ("drawn_ranks", "methods", "optimizers", "jobs", "preferences")
ALL = [row for name in FILES for row in read(Path(__file__).parents[1] / "rehearse" / f"{name}.jsonl")]
ROWS = [row for number, row in enumerate(ALL) if number % 3 == 0 or "torchtune-dpo" in row["job"]]
"""Some of each; all in which the outputs of a step live on."""
FEW = 2**16
"""Bytes: ZeRO allocates small tensors one by one that the ledger counts together."""


@pytest.mark.one_in(3)
@pytest.mark.parametrize("row", ROWS, ids=[row["job"] for row in ROWS])
def test_tensors_add_up_to_what_is_allocated(row: dict[str, Any]) -> None:
    """Loading may count more: Adagrad's states of a whole adapter before it is divided."""
    model, options = job_of(row["job"])
    options = {**options, **row.get("options", {}), "expandable_segments": True}
    script = LOOP if options.get("trainer") == "plain" else NO_SCRIPT
    peaks = estimate(row.get("model_config", model), script=script, **options).peaks
    if peaks is None:  # a traced row
        return
    assert isinstance(peaks, InstantPeaks)
    peaks = peaks.largest
    allocated = peaks.run().peaks().allocated
    for phase, requested in peaks.requested.items():
        lines = [line for line in peaks.ledgers[phase] if line.name != "tails of unsplit blocks"]
        assert sum(line.bytes() for line in lines if line.place == "device") == requested
        assert allocated.get(phase, 0) - requested < FEW, phase
        assert phase == "load" or requested - allocated[phase] < FEW, phase
