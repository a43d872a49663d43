"""Evaluations between steps against rehearsed jobs of transformers and TRL; a rehearsal counts them into the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from tools.rehearsed_axolotl import options
from tools.rehearsed_jobs import compared, read

ROWS = read(Path(__file__).with_name("evaluated.jsonl"))
IN_AXOLOTL = read(Path(__file__).with_name("axolotl_evaluated.jsonl"))

PHASES = {"backward": 0.16}
"""Per cent; other phases 0.05."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["job"]))
def test_formulas_hold_what_an_evaluation_holds(row: dict[str, object]) -> None:
    """How much is reserved depends on how many steps lie between two evaluations. Full fine-tuning was rehearsed with one behind
    every second step; of TRL with micro batches 3.3 % more is stated. Behind an evaluation blocks have other tails: 1 MB in a
    backward of 0.7 GB."""
    ((_, _, drift),) = compared([row], ("analytic",))
    assert drift is not None
    assert {what: value for what, value in drift.items() if what != "reserved" and abs(value) > PHASES.get(what, 0.05)} == {}
    assert abs(drift["reserved"]) <= (3.4 if "--gradient-accumulation-steps 2 --eval-batch-size 16" in str(row["job"]) else 0.2)


@pytest.mark.parametrize("row", IN_AXOLOTL, ids=lambda row: str(row["values"]["sequence_len"]))
def test_an_evaluation_by_axolotl_makes_the_logits_that_liger_s_loss_leaves_out(row: dict[str, Any]) -> None:
    """It evaluates before the first step too, which a rehearsal counts into loading."""
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    assert peaks.reserved is not None
    assert peaks.phase == "evaluate"
    assert abs(peaks.allocated / row["allocated"] - 1) <= 0.0005
    assert abs(peaks.reserved / row["reserved"] - 1) <= 0.002
