"""What a measured run prints."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.accuracy.drift import Answer
from peftplan.accuracy.engines import Case, Stated
from peftplan.accuracy.records import Record
from peftplan.measure import lines
from tests.accuracy.example import record

GIB = 2**30


def measured(**changes: Any) -> Record:
    peaks = {
        "by_phase": {"forward": {"allocated": 2 * GIB, "reserved": 3 * GIB}},
        "overall": {"allocated": 2 * GIB, "reserved": 4 * GIB},
    }
    return record(peaks=peaks, counts={"trainable": 1000, "total": 10_000}, **changes)


def stated(run_record: Record, **figures: int) -> Answer:
    from pathlib import Path

    return Answer(Case(Path("x"), 1, run_record), Stated(trainable=1000, total=10_000, figures=figures))  # type: ignore[arg-type]


def test_a_record_beside_two_engines() -> None:
    run_record = measured()
    answers = {
        "analytic": stated(run_record, allocated=GIB, forward=GIB),
        "trace": stated(run_record, allocated=2 * GIB, reserved=5 * GIB, forward=3 * GIB),
    }
    assert lines.of_record(run_record, answers) == [  # type: ignore[arg-type]
        "llama-2-7b · lora · NVIDIA A100-SXM4-80GB · ok",
        "                  measured      analytic         trace",
        "allocated         2.00 GiB      -50.00 %       +0.00 %",
        "reserved          4.00 GiB             –      +25.00 %",
        "forward           2.00 GiB      -50.00 %      +50.00 %",
        "trainable 1,000 of 10,000 parameters; as estimated",
    ]


def test_a_wrong_count_and_a_silent_engine_are_said() -> None:
    run_record = measured()
    from pathlib import Path

    wrong = Answer(Case(Path("x"), 1, run_record), Stated(trainable=999, total=10_000, refused=None))
    shown = lines.of_record(run_record, {"analytic": wrong})
    assert shown[-2] == "trainable 1,000 of 10,000 parameters; trainable: 999 estimated"
    assert shown[-1] == "analytic: gives no peak for this run"


def test_one_line_of_a_suite_and_its_summary() -> None:
    run_record = measured()
    answers = {"trace": stated(run_record, allocated=2 * GIB, reserved=5 * GIB)}
    line = lines.of_run(3, 48, run_record, answers, seconds=12.4)  # type: ignore[arg-type]
    assert line == ("[ 3/48] llama-2-7b lora ok  allocated 2.00 GiB (trace +0.00 %)  reserved 4.00 GiB (trace +25.00 %)  12 s")
    oom = record(outcome="oom", error="forward: OutOfMemoryError: CUDA out of memory", peaks={})
    assert lines.of_run(4, 48, oom, {}, seconds=3).endswith("oom  forward: OutOfMemoryError: CUDA out of memory  3 s")
    other = {"trace": stated(run_record, allocated=2 * GIB, reserved=3 * GIB)}
    # reserved drifts +25 % and -25 % of 4 GiB: the median is between, the worst is the first of the largest
    assert lines.of_suite([run_record, oom, run_record], [answers, {}, other]) == [  # type: ignore[list-item]
        "2 ok, 1 oom, 0 failed",
        "trace: allocated drift over 2 runs: median +0.00 %, worst +0.00 %",
        "trace: reserved drift over 2 runs: median +0.00 %, worst +25.00 %",
    ]


def test_a_fault_of_an_engine_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise AssertionError("in the engine")

    monkeypatch.setattr(lines, "ask", broken)
    (answer,) = lines.answers(measured(), ["analytic"]).values()
    assert answer.stated.refused == "AssertionError: in the engine"
