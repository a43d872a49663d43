"""Evaluations between steps against rehearsed jobs of transformers and TRL; a rehearsal counts them into the step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.rehearsed_jobs import compared, read

ROWS = read(Path(__file__).with_name("evaluated.jsonl"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["job"]))
def test_formulas_hold_what_an_evaluation_holds(row: dict[str, object]) -> None:
    """Behind an evaluation FSDP2's root is still gathered: the next forward, which gathers it in other steps, has less."""
    ((_, _, drift),) = compared([row], ("analytic",))
    assert drift is not None
    apart = ("reserved", "forward") if "fsdp2" in str(row["job"]) else ("reserved",)
    assert {what: value for what, value in drift.items() if what not in apart and abs(value) > 0.05} == {}
    assert abs(drift["reserved"]) <= 0.2
