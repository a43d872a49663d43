"""Gemma 4 with a few layers: formulas against programs of transformers, TRL or torch alone on the emulated card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools.rehearsed_jobs import drifts, read

ROWS = read(Path(__file__).with_name("gemma4.jsonl"))
LARGEST = {"allocated": 0.03, "reserved": 0.9, "load": 0.05, "forward": 0.06, "backward": 0.03, "step": 0.1}
"""Per cent: full fine-tuning of experts by SFTTrainer; all others 0.01, and 0.2 reserved."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(str(row["job"]).split()[:5]))
def test_formulas_hold_what_programs_hold(row: dict[str, Any]) -> None:
    drift = drifts(row, "analytic")
    assert drift is not None
    assert {what: number for what, number in drift.items() if abs(number) > LARGEST[what]} == {}
