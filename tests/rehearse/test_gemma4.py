"""Gemma 4 with a few layers: formulas against programs of transformers, TRL or torch alone on the emulated card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools.rehearsed_jobs import drifts, read

ROWS = read(Path(__file__).with_name("gemma4.jsonl"))
LARGEST = {"reserved": 0.2, "load": 0.01, "step": 0.02, **dict.fromkeys(("allocated", "forward", "backward"), 0.001)}
"""Per cent."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(str(row["job"]).split()[:5]))
def test_formulas_hold_what_programs_hold(row: dict[str, Any]) -> None:
    drift = drifts(row, "analytic")
    assert drift is not None
    assert {what: number for what, number in drift.items() if abs(number) > LARGEST[what]} == {}
