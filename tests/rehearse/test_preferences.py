"""Formulas against trainers of preferences and rewards that were rehearsed as programs of TRL and of tools that run it."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from peftplan.job.trainers import TRAINERS
from tools.rehearsed_jobs import compared, page, read

ROOT = Path(__file__).parents[2]
ROWS = read(Path(__file__).with_name("preferences.jsonl"))
MEDIAN = {"allocated": 0.1, "reserved": 0.1}
LARGEST = {"allocated": 1.0, "reserved": 3.0}
"""Per cent."""
TITLE = "preferences and rewards"

Results = list[tuple[str, dict[str, object], dict[str, float] | None]]


@pytest.fixture(scope="module")
def results() -> Results:
    return list(compared(ROWS, ("analytic",)))


@pytest.mark.parametrize("what", LARGEST)
def test_formulas_hold_what_trl_holds(what: str, results: Results) -> None:
    drifts = [drift[what] for _, _, drift in results if drift is not None]
    assert len(drifts) == len(ROWS)
    assert statistics.median(map(abs, drifts)) <= MEDIAN[what]
    assert max(map(abs, drifts)) <= LARGEST[what]


def test_each_trainer_was_rehearsed() -> None:
    jobs = [str(row["job"]) for row in ROWS]
    trainers = [trainer.name for trainer in TRAINERS.values() if trainer.of_preferences and not trainer.embeds]
    assert [name for name in trainers if not any(f"--trainer {name} " in job for job in jobs)] == []


def test_the_page_shows_the_rows(results: Results) -> None:
    text = (ROOT / "docs" / "preference-drift.md").read_text(encoding="utf-8")
    assert text == page(results, called=TITLE)
