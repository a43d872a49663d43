"""What peftplan reads of ms-swift's arguments, against `swift sft` with them on the emulated card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from tools.rehearsed_jobs import read
from tools.rehearsed_swift import options, plan

ROWS = read(Path(__file__).with_name("swift.jsonl"))
LARGEST = {"allocated": 0.01, "reserved": 0.01}
"""Per cent."""


@pytest.mark.parametrize("row", ROWS, ids=[" ".join(f"{key}={value}" for key, value in row["values"].items()) for row in ROWS])
def test_formulas_hold_what_swift_holds(row: dict[str, Any]) -> None:
    assert not plan(row).unsupported
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    drift = {what: 100 * (getattr(peaks, what) / row[what] - 1) for what in LARGEST}
    assert {what: number for what, number in drift.items() if abs(number) > LARGEST[what]} == {}
