"""Programs that know nothing of peftplan run on the emulated card, and their peaks are what the formulas say."""

from __future__ import annotations

import json

import pytest

from tools.rehearsals import DATA, MARKS, PAGE, Program, programs, run, table


@pytest.mark.parametrize("program", programs(), ids=lambda program: program.path.stem)
@pytest.mark.rehearse
def test_a_program_runs_unmodified(program: Program) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("needs the CUDA build of torch")
    if program.missing:
        pytest.skip(f"needs {', '.join(program.missing)}")
    row = run(program)
    assert row["exit_code"] == program.exit_code
    assert row["ended"] == ("out_of_memory" if program.exit_code else "steps")
    if row["estimated"] is not None:
        assert row["peak_allocated"] == pytest.approx(row["estimated"]["allocated"], rel=0.001)
        assert row["peak_reserved"] == pytest.approx(row["estimated"]["reserved"], rel=0.01)


def test_the_page_shows_what_was_kept() -> None:
    rows = json.loads(DATA.read_text(encoding="utf-8"))
    assert {row["program"] for row in rows} == {program.path.stem for program in programs()}
    assert table(rows) == PAGE.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0].strip()
