"""The table of other estimators: what was rehearsed, and what the formulas say today. Their own columns need their packages."""

from __future__ import annotations

from tools import marked
from tools.rank_estimators import JOBS, MARKS, cell, ours
from tools.rank_jobs import PAGE, rows


def test_the_table_is_of_today() -> None:
    by_name = {row["name"]: row for row in rows()}
    table = [line.split(" | ") for line in marked.part(PAGE, MARKS).splitlines()[2:]]
    assert len(table) == len(JOBS)
    for (name, called), cells in zip(JOBS.items(), table, strict=True):
        row = by_name[name]
        measured = max(row["peak_by_phase"].values())
        assert cells[:4] == [f"| {called}", str(row["world"]), f"{measured:,}", cell(ours(row), measured)]
