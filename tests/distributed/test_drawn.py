"""Jobs over several GPUs that were drawn among those with a peak, each rehearsed as a program of transformers or TRL."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.rehearsed_jobs import PHASES, drifts, read

ROWS = read(Path(__file__).parents[1] / "rehearse" / "drawn_ranks.jsonl")
LARGEST = {"reserved": 3.0, **dict.fromkeys(("allocated", *PHASES), 0.3)}
"""Per cent."""


@pytest.mark.parametrize("row", ROWS, ids=[row["job"] for row in ROWS])
def test_a_drawn_job(row: dict[str, object]) -> None:
    """The steps of RAdam are counted from the fifth on: earlier ones do not divide by its root. A base in nf4 has double
    quantization where the job says so, as QLoRA does. No trainer calls AdaLoRA's `update_and_allocate`."""
    drift = drifts(row, "analytic")
    assert drift is not None
    largest = LARGEST | ({"step": 1.0} if "--method boft" in str(row["job"]) else {})  # 0.3 MB
    assert {what for what, percent in drift.items() if abs(percent) > largest[what]} == set()
