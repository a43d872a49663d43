"""Programs that know nothing of peftplan run on the emulated card, and their peaks are what the formulas say."""

from __future__ import annotations

import json
import statistics
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

import peftplan
from peftplan.accuracy.drift import measured_figures
from tools import marked, referees, rehearsed_suite
from tools.rehearsals import (
    DATA,
    MARKS,
    OF_RELEASES,
    PAGE,
    PROGRAMS,
    RELEASES,
    REPORT,
    ROOT,
    Program,
    estimated,
    programs,
    report_of,
    run,
    table,
    table_of_releases,
)

PUBLISHED, SUITE = (path.read_text(encoding="utf-8").splitlines() for path in (referees.PUBLISHED, rehearsed_suite.SUITE))
SAME = ("ended", "steps", "peak_allocated", "peak_reserved", "verdict", "oom")
"""What a program shows again wherever the same releases are installed."""
OPEN = {
    "accelerate_loop": (0.0014, 0.0),
    "grpo": (0.03, 1.0),
    "zero3_offload": (0.1, 0.13),
    "sft_packing": (0.06, 0.12),
    "unsloth_qlora": (0.007, 0.0),
    "unsloth_dropout": (0.006, 1.2),
}
"""How far allocated and reserved bytes are off at most, in per cent, where formulas do not follow what is known, or no tensor
explains it yet.

accelerate's own loop fetches a batch at a time, where Trainer, which the estimate names, collects both of a step (32,768 bytes).
axolotl's attention of packed rows takes their bounds, where the formula counts a mask (8,388,608 bytes); its rotary tables are
of each row, and its batch has positions (622,592 bytes).
"""


@pytest.mark.parametrize("program", programs(), ids=lambda program: program.path.stem)
@pytest.mark.rehearse
def test_a_program_runs_unmodified(program: Program) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("needs the CUDA build of torch")
    if program.missing:
        pytest.skip(f"needs {', '.join(program.missing)}")
    row = run(program)
    kept = next(each for each in json.loads(DATA.read_text(encoding="utf-8")) if each["program"] == program.path.stem)
    if row["versions"] == kept["versions"]:
        assert {name: row[name] for name in SAME} == {name: kept[name] for name in SAME}
    assert row["exit_code"] == program.exit_code
    assert row["ended"] == ("out_of_memory" if program.exit_code else "steps")
    if not program.exit_code:
        hold(row)


def hold(row: dict[str, Any]) -> None:
    """Both engines state what the program held."""
    allocated, reserved = OPEN.get(row["program"], (0.001, 0.0))
    for stated in (row["estimated"], row["traced"]):
        if stated:
            most = pytest.approx(row["peak_allocated"], rel=allocated / 100, abs=2**16)
            assert stated["allocated"] == most
            assert stated["reserved"] == pytest.approx(row["peak_reserved"], rel=reserved / 100)


def test_the_page_shows_what_was_kept() -> None:
    rows = json.loads(DATA.read_text(encoding="utf-8"))
    assert {row["program"] for row in rows} == {program.path.stem for program in programs()}
    assert table(rows) == marked.part(PAGE, MARKS)
    report = report_of(rows)
    assert report == marked.part(PAGE, REPORT)
    assert "torch.OutOfMemoryError" not in report  # that is the program's own output
    assert f"at {PROGRAMS.relative_to(ROOT)}/out_of_memory.py:18: trainer.train()" in report


def test_the_page_shows_what_releases_of_torch_held() -> None:
    """The programs' own row of the plain loop is one of them."""
    rows = json.loads(RELEASES.read_text(encoding="utf-8"))
    assert table_of_releases(rows) == marked.part(PAGE, OF_RELEASES)
    plain = next(row for row in json.loads(DATA.read_text(encoding="utf-8")) if row["program"] == "plain")
    same = next(row for row in rows if row["torch"] == plain["versions"]["torch"])
    assert {peak: same[peak] for peak in ("peak_allocated", "peak_reserved")} == {
        peak: plain[peak] for peak in ("peak_allocated", "peak_reserved")
    }


@pytest.mark.parametrize("program", [p for p in programs() if p.estimate], ids=lambda program: program.path.stem)
def test_the_formulas_say_what_a_program_held(program: Program) -> None:
    """A trainer of TRL loads a model by name with a warm-up block that is 2 MiB short; the formulas have it to the byte.

    They leave out what a batch brings beside its tokens and labels, such as BERT's token types.
    """
    row = next(row for row in json.loads(DATA.read_text(encoding="utf-8")) if row["program"] == program.path.stem)
    assert estimated(program) == row["estimated"]
    if not row["oom"]:
        hold(row)


def test_another_tools_benchmark_records_what_it_recorded_on_a_real_card() -> None:
    """With the torch and transformers of the published runs; with others the page says what differs."""
    rows = json.loads(referees.ROWS.read_text(encoding="utf-8"))
    assert referees.table(rows) == marked.part(PAGE, referees.MARKS)
    same = [row for row in rows if (row["versions"]["torch"], row["versions"]["transformers"]) == ("2.14.1", "4.57.6")]
    assert len(same) == len(PUBLISHED)
    assert [row["rehearsed"] for row in same] == [row["published"] for row in same]


@pytest.mark.parametrize("record", map(json.loads, PUBLISHED), ids=lambda record: record["id"])
@pytest.mark.rehearse
def test_another_tools_benchmark_records_it_again(record: dict[str, Any]) -> None:
    """Needs its own environment: vramcalc, and the torch and transformers of the published runs."""
    for name, release in (("vramcalc", "0.1.2"), ("torch", "2.14.1"), ("transformers", "4.57.6")):
        if _release(name) != release:
            pytest.skip(f"needs {name} {release}")
    assert referees.measured(record["run"])["measured"]["total"] == record["peaks"]["overall"]["allocated"]


@pytest.mark.parametrize("line", SUITE, ids=lambda line: rehearsed_suite.title(json.loads(line)))
@pytest.mark.rehearse
def test_a_run_of_the_suite_holds_what_the_trace_says(line: str) -> None:
    """Bars: 0.1 % of allocated and 0.5 % of reserved bytes. With the same releases, each figure is the one that was kept."""
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("needs the CUDA build of torch")
    for name in ("bitsandbytes", "nvidia-ml-py"):
        if _release(name) is None:
            pytest.skip(f"needs {name}")
    row = next(row for row in json.loads(rehearsed_suite.ROWS.read_text(encoding="utf-8")) if row["run"] == json.loads(line))
    record = rehearsed_suite.measured(line)
    assert record.outcome == row["outcome"]
    figures = dict(measured_figures(record))
    if record.outcome == "ok":
        if dict(record.circumstances.versions).items() >= row["versions"].items():
            assert {name: figures[name] for name in row["rehearsed"]} == row["rehearsed"]
        assert row["traced"]["allocated"] == pytest.approx(figures["allocated"], rel=0.001)
        assert row["traced"]["reserved"] == pytest.approx(figures["reserved"], rel=0.005)


def _release(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def test_the_trace_says_what_the_suite_holds_on_a_rehearsed_card() -> None:
    rows = json.loads(rehearsed_suite.ROWS.read_text(encoding="utf-8"))
    assert rehearsed_suite.table(rows) == marked.part(PAGE, rehearsed_suite.MARKS)
    assert [row["run"] for row in rows] == list(map(json.loads, SUITE))
    assert {row["outcome"] for row in rows if row["rehearsed"]} == {"ok"}
    for figure, largest in (("allocated", 0.1), ("reserved", 0.5)):
        drifts = [abs(drift) for row in rows if (drift := rehearsed_suite.drift(row, figure)) is not None]
        assert statistics.median(drifts) <= largest / 5
        assert max(drifts) <= largest


def test_the_trace_still_says_what_is_kept_of_it() -> None:
    pytest.importorskip("transformers")
    rows = json.loads(rehearsed_suite.ROWS.read_text(encoding="utf-8"))
    row = next(row for row in rows if row["run"]["model"] == "gpt2")  # the quickest to trace
    if any(version(name).partition("+")[0] != row["versions"][name] for name in ("torch", "transformers")):
        pytest.skip("kept with another torch or transformers")
    peaks = peftplan.estimate(**row["run"], engine="trace").peaks
    assert peaks is not None
    assert row["traced"] == {"allocated": peaks.allocated, "reserved": peaks.reserved, **peaks.by_phase}
