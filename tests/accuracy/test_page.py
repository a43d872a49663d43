"""The accuracy page: from files alone, the same bytes every time, and what is in the repository is what the files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftplan.accuracy import peers
from peftplan.accuracy.drift import Answer
from peftplan.accuracy.engines import Case, Stated, read_cases
from peftplan.datafiles import DATA
from peftplan.report import accuracy_page
from tests.accuracy.example import record

ROOT = DATA.parent


def test_the_page_in_the_repository_is_what_the_data_say() -> None:
    page = accuracy_page.text({engine: accuracy_page.stored_answers(engine) for engine in accuracy_page.ENGINES})
    assert page == (ROOT / accuracy_page.PAGE).read_text(encoding="utf-8"), "write it again: peftplan check --report"


def test_every_plot_that_the_page_shows_is_there() -> None:
    page = ROOT / accuracy_page.PAGE
    shown = [
        line.rpartition("(")[2].rstrip(")") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("![")
    ]
    assert shown
    assert all((page.parent / name).is_file() for name in shown)


def test_written_twice_it_is_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = []
    for name in ("a", "b"):
        accuracy_page.write(tmp_path / name)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()})
    assert written[0] == written[1]
    assert {"accuracy.md", "drift.svg"} <= set(written[0])
    assert b"<dc:date>" not in written[0]["drift.svg"]


def tool(**stated: dict[str, int]) -> peers.Tool:
    return peers.Tool(version="1", cold_seconds=0.25, stated=stated, refused={"no": 2})


def test_tools_are_compared_by_one_figure_and_one_rule() -> None:
    """Measured 1000 MiB: 900 says `fits` of 990 (5 % of it is 49.5); 1101 says no to 1100; 1000 is right on both."""
    mib = 2**20
    records = [record(id=name, peaks={"overall": {"allocated": 1000 * mib, "reserved": 1}}) for name in ("a", "b", "c")]
    stored_run = peers.Peers(
        python="3",
        records=3,
        tools={
            "x": tool(
                **{name: {"allocated": size * mib, "reserved": 9} for name, size in zip("abc", (900, 1000, 1101), strict=True)}
            )
        },
    )
    (row,) = peers.table(stored_run, records)[1]
    assert row == ("x", "1", "3 of 3", "10.0 %", "+0.0 %", "+10.1 %", "33%", "1 of 3", "1 of 3", "0.25 s")
    other = peers.compared(tool(b={"allocated": 1010 * mib}), records)
    assert peers.against("x", stored_run, other, records) == ("x", "1", "0.00 %", "+0.00 %", "1.00 %", "+1.00 %")


def test_a_tool_without_allocated_bytes_is_compared_by_the_next_figure() -> None:
    records = [record(peaks={"overall": {"allocated": 100, "reserved": 200}, "device_bytes": 300})]
    (compared,) = peers.compared(tool(example={"device": 330, "reserved": 220}), records).values()
    assert (compared.figure, compared.drift) == ("reserved", 10)


def test_the_page_names_each_wrong_verdict() -> None:
    run_record = record(peaks={"overall": {"allocated": 2**30}})
    wrong = Answer(Case(Path("x.jsonl"), 1, run_record), Stated(figures={"allocated": 2**29}))
    page = accuracy_page.text({"trace": [wrong], "analytic": []})
    assert "| example | 1 % below its peak | fits | allocated -50.00 % |" in page


def test_nothing_is_kept_twice() -> None:
    """A published row is one record: two records of one card, time and peak would be the same run under two names."""
    seen: dict[tuple[object, ...], str] = {}
    for case in read_cases([]):
        where = case.record.circumstances
        key = (
            where.source,
            where.path,
            where.commit,
            where.gpu,
            case.record.peaks.overall,
            case.record.peaks.device_bytes,
            where.date,
        )
        key = (*key, str(case.record.run), str(case.record.steps))
        assert key not in seen, f"{case.record.id} is {seen.get(key)}"
        seen[key] = case.record.id
