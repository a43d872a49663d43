"""Evaluations between steps against rehearsed jobs of transformers and TRL; a rehearsal counts them into the step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.rehearsed_jobs import compared, read

ROWS = read(Path(__file__).with_name("evaluated.jsonl"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["job"]))
def test_formulas_hold_what_an_evaluation_holds(row: dict[str, object]) -> None:
    ((_, _, drift),) = compared([row], ("analytic",))
    assert drift is not None
    assert {what: abs(value) <= 0.05 for what, value in drift.items() if what != "reserved"} == dict.fromkeys(
        ("allocated", "load", "forward", "backward", "step"), True
    )
    assert abs(drift["reserved"]) <= 0.2
