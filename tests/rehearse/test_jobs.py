"""Formulas against random jobs that were rehearsed as programs of transformers, TRL or torch alone."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tools.rehearsed_jobs import compared, drawn, engines, page, read

ROOT = Path(__file__).parents[2]
ROWS = read(Path(__file__).with_name("jobs.jsonl"))
LARGEST = {"allocated": 0.13, "reserved": 0.6}
"""Per cent: DoRA of pythia-160m, and of opt-125m."""


@pytest.fixture(scope="module")
def results() -> list[tuple[str, dict[str, object], dict[str, float] | None]]:
    return list(compared(ROWS, engines(ROWS)))


@pytest.mark.parametrize("what", LARGEST)
def test_formulas_hold_what_real_trainers_hold(what: str, results: list[tuple[str, dict[str, object], dict[str, float]]]) -> None:
    drifts = {row["job"]: abs(drift[what]) for engine, row, drift in results if engine == "analytic" and drift is not None}
    assert len(drifts) >= 0.9 * len(ROWS) >= 54
    assert statistics.median(drifts.values()) <= 0.05
    assert max(drifts.values()) <= LARGEST[what]


@pytest.mark.parametrize(("what", "most"), [("allocated", 0.001), ("reserved", 0.0)])
def test_most_traces_hold_it_to_the_byte(
    what: str, most: float, results: list[tuple[str, dict[str, object], dict[str, float]]]
) -> None:
    drifts = [abs(drift[what]) for engine, _, drift in results if engine == "trace" and drift is not None]
    assert len(drifts) == len(ROWS) >= 60
    assert statistics.median(drifts) <= most


def test_the_page_shows_the_rows(results: list[tuple[str, dict[str, object], dict[str, float] | None]]) -> None:
    assert page(results) == (ROOT / "docs" / "rehearsal-drift.md").read_text(encoding="utf-8")


def test_a_job_is_drawn_from_its_seed_and_number() -> None:
    assert drawn(1, 5) == drawn(1, 5) != drawn(1, 6)
