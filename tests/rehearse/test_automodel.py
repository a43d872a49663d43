"""Formulas against NeMo Automodel's own recipe, rehearsed as rank 0 of 8 (`tools.rehearsed_automodel`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.job.automodel import REHEARSED
from tools.rank_grid import cut
from tools.rehearsed_automodel import options

ROWS = [json.loads(line) for line in Path(__file__).with_name("automodel.jsonl").read_text(encoding="utf-8").splitlines()]
LARGEST = {"allocated": 0.01, "reserved": 0.1}
LARGEST_OF_PHASE = 0.15
"""Per cent."""


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['model']} {row['options']['method']}" for row in ROWS])
def test_formulas_hold_what_the_recipe_holds(row: dict[str, Any]) -> None:
    peaks = peftplan.estimate(**options(row), gpu="a100-80gb").peaks
    assert peaks is not None
    stated = {"allocated": peaks.allocated, "reserved": peaks.reserved}
    drifts = {what: 100 * (value / row[what] - 1) for what, value in stated.items()}
    assert all(abs(drift) <= LARGEST[what] for what, drift in drifts.items()), drifts
    by_phase = {phase: 100 * (peaks.by_phase[phase] / rehearsed - 1) for phase, rehearsed in row["by_phase"].items()}
    assert all(abs(drift) <= LARGEST_OF_PHASE for drift in by_phase.values()), by_phase


def test_each_model_type_was_rehearsed() -> None:
    types = {cut(row["model"], row["layers"])["model_type"] for row in ROWS}
    assert types == set(REHEARSED)
