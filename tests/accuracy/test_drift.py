"""Drift, verdicts, baseline and failures, on numbers that are worked out by hand; and the check of what ships."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import pytest

from peftplan.accuracy import baseline as stored
from peftplan.accuracy import engines
from peftplan.accuracy.check import Check, check, command
from peftplan.accuracy.drift import Answer, summaries, totals
from peftplan.accuracy.engines import Case, Figure, Stated, ask, read_cases, record_files, sampled
from peftplan.accuracy.jsonl import append, digest
from peftplan.accuracy.records import Record
from peftplan.errors import MissingExtraError, PeftplanError
from peftplan.ledger import Ledger, Line
from peftplan.planning.estimate import estimate
from peftplan.report import accuracy
from peftplan.report.checked import FORMATS
from peftplan.results.estimate import Estimate
from peftplan.results.peaks import Peaks
from tests.accuracy.example import PAYLOAD, record
from tests.cli.run import run

MIB = 2**20


def answer(measured: dict[str, Any], stated: dict[Figure, int], *, verdict: str | None = None, **changes: Any) -> Answer:
    run_record = record(peaks=measured, **changes)
    return Answer(Case(Path("runs.jsonl"), 7, run_record), Stated(figures=stated, verdict=verdict))


def overall(**peaks: int) -> dict[str, Any]:
    return {"overall": peaks}


def test_drift_is_signed_and_relative_to_what_was_measured() -> None:
    compared_run = answer(overall(allocated=200, reserved=400), {"allocated": 210, "reserved": 390, "device": 1})
    assert [(one.figure, one.drift) for one in compared_run.compared] == [
        ("allocated", pytest.approx(5)),
        ("reserved", pytest.approx(-2.5)),
    ]


def test_phases_compare_with_phases_and_stay_out_of_the_overall() -> None:
    peaks = {"by_phase": {"forward": {"allocated": 100}}, "overall": {"allocated": 200}}
    compared_run = answer(peaks, {"allocated": 200, "forward": 101, "step": 5})
    assert {one.figure: one.drift for one in compared_run.compared} == {"allocated": 0, "forward": pytest.approx(1)}
    assert [one.figure for one in compared_run.overall] == ["allocated"]


def test_allocated_bytes_stand_beside_reserved_ones_where_nothing_else_compares() -> None:
    bound = answer(overall(reserved=400), {"allocated": 300}).bound
    assert bound is not None
    assert (bound.figure, bound.measured, bound.stated) == ("reserved", 400, 300)
    assert answer(overall(reserved=400), {"allocated": 300, "reserved": 410}).bound is None
    assert answer(overall(allocated=400), {"allocated": 300}).bound is None
    lines = accuracy.headline("analytic", [answer(overall(reserved=400), {"allocated": size}) for size in (300, 360, 440)])
    assert any("90% (median), 75% to 110%; 1 lie above" in line for line in lines)


@pytest.mark.parametrize(
    ("stated", "wrong"),
    [
        # a card of 990 MiB: `fits` needs 5 % of it left over, so at most 940.5 MiB; one of 1100 MiB holds at most 1100
        (940, {"below": "fits"}),
        (941, {}),
        (1000, {}),
        (1100, {}),
        (1101, {"above": "does_not_fit"}),
    ],
)
def test_verdicts_on_synthetic_cards(stated: int, wrong: dict[str, str]) -> None:
    assert answer(overall(reserved=1000 * MIB), {"reserved": stated * MIB}).wrong_verdicts == wrong


@pytest.mark.parametrize(
    ("outcome", "verdict", "wrong"),
    [
        ("ok", "fits", {}),
        ("ok", "tight", {}),
        ("ok", "unknown", {}),
        ("ok", "does_not_fit", {"own": "does_not_fit"}),
        ("oom", "does_not_fit", {}),
        ("oom", "tight", {}),
        ("oom", "fits", {"own": "fits"}),
        ("ok", "does_not_run", {"own": "does_not_run"}),
        ("oom", "does_not_run", {"own": "does_not_run"}),
        ("failed", "does_not_run", {}),
    ],
)
def test_verdicts_on_the_card_it_ran_on(outcome: str, verdict: str, wrong: dict[str, str]) -> None:
    assert answer(overall(reserved=1), {}, verdict=verdict, outcome=outcome).wrong_verdicts == wrong


def test_a_run_that_ran_out_of_memory_has_a_verdict_and_no_drift() -> None:
    """Its counters stood still at what it had reached; a run that failed otherwise says nothing of a card."""
    reached = overall(allocated=100, reserved=200)
    verdicts = {"oom": "fits", "tight": "tight", "right": "does_not_fit"}
    ended = [answer(reached, {"allocated": 300}, verdict=verdict, outcome="oom", id=name) for name, verdict in verdicts.items()]
    failed = answer(reached, {"allocated": 300}, verdict="does_not_fit", outcome="failed", id="failed")
    assert all(sums.compared == () and sums.bound is None for sums in [*ended, failed])
    assert summaries([*ended, failed], "source") == []
    sums = totals([*ended, failed, answer(reached, {"allocated": 100}, verdict="fits")])
    assert sums.out_of_memory == {"fits": 1, "tight": 1, "does_not_fit": 1}
    assert sums.verdicts == {"own": (1, 4), "below": (0, 1), "above": (0, 1)}
    lines = accuracy.headline("analytic", ended)
    assert "Verdicts on the cards where runs ran out of memory: 1 fits, 1 tight, 1 does_not_fit." in lines


def test_a_summary_by_hand() -> None:
    """Drifts −4, −1, +0.5 and +2 %: median −0.25, absolute 1.5; within 1 % two of four, 3 % three, 5 % all."""
    answers = [answer(overall(allocated=1000), {"allocated": stated}, id=str(stated)) for stated in (960, 990, 1005, 1020)]
    (summary,) = summaries(answers, "source")
    assert (summary.group, summary.figure, summary.rows, summary.worst_id) == ("tests", "allocated", 4, "960")
    assert (summary.median, summary.median_unsigned, summary.worst) == pytest.approx((-0.25, 1.5, -4))
    assert summary.within == (0.5, 0.75, 1.0)
    assert summary.wrong == 0
    too_much = answer(overall(allocated=1000), {"allocated": 1101}, id="too much")
    assert [row.wrong for row in summaries([*answers, too_much], "source")] == [1]
    assert [row.group for row in summaries(answers, "method")] == ["lora"]
    assert [row.group for row in summaries(answers, "model")] == ["llama-2-7b"]


def test_totals() -> None:
    answers = [
        answer(overall(allocated=100), {"allocated": 120}, verdict="fits"),
        answer(overall(allocated=100), {}, verdict="unknown"),
        Answer(Case(Path("x"), 1, record()), Stated(refused="no")),
    ]
    sums = totals(answers)
    assert (sums.records, sums.with_peak, sums.no_peak, sums.refused) == (3, 1, 1, 1)
    assert sums.verdicts == {"own": (0, 1), "below": (0, 1), "above": (1, 1)}


def test_counts_that_differ_are_failures() -> None:
    printed = record(counts={"trainable": 19_988_481, "total": 6_758_404_096}, run={**PAYLOAD["run"], "model": "llama-2-7b"})
    result = check([Case(Path("runs.jsonl"), 7, printed)], "analytic", baseline=stored.Baseline())
    # llama-2-7b, r 8 on all seven linears: 32·8·(4·(4096 + 4096) + 3·(4096 + 11008)) = 19,988,480
    (failure,) = [failure for failure in result.failures if "trainable" in failure.what]
    assert failure.kind == "count"
    assert "stated 19,988,480, printed by the run 19,988,481 (-0.0000 %)" in failure.what
    assert failure.text("analytic").endswith("again: peftplan check runs.jsonl --id example --engine analytic")


def with_peak(num_bytes: int, reserved: int | None = None) -> Peaks:
    """Peaks of one line per phase, highest in backward."""

    def ledger(size: int) -> Ledger:
        return Ledger((Line("all", "temporaries", "uint8", (size,), 1, "test"),))

    sizes = {"load": num_bytes // 2, "forward": num_bytes // 4, "backward": num_bytes, "step": num_bytes // 8}
    return Peaks({phase: ledger(size) for phase, size in sizes.items()}, reserved=reserved)


def engine_that_states(num_bytes: int, reserved: int | None = None) -> Any:
    """`estimate` with a peak of its own: every other number is the real one."""

    def stating(*args: Any, **kwargs: Any) -> Estimate:
        return replace(estimate(*args, **kwargs), peaks=with_peak(num_bytes, reserved))

    return patch.object(engines, "estimate", stating)


def engine_that_states_nothing() -> Any:
    """`estimate` without peaks, whatever the engine."""
    return patch.object(engines, "estimate", lambda *args, **kwargs: replace(estimate(*args, **kwargs), peaks=None))


GIB = 2**30
RUN = record(peaks=overall(allocated=32 * GIB), tolerance={"analytic": {"allocated": 2.0}})


def checked(baseline: stored.Baseline, *, run_record: Record = RUN) -> Check:
    return check([Case(Path("runs.jsonl"), 3, run_record)], "analytic", baseline=baseline)


def test_a_tolerance_is_held_and_exceeded() -> None:
    with engine_that_states(32 * GIB + 300 * MIB):  # 300 / 32768 = + 0.92 %
        assert checked(stored.Baseline()).failures == ()
    with engine_that_states(33 * GIB):  # 1 / 32 = + 3.125 %
        (failure,) = checked(stored.Baseline()).failures
    text = failure.text("analytic")
    assert text.startswith("tolerance: example (runs.jsonl:3) allocated: stated 35,433,480,192 bytes, measured 34,359,738,368")
    assert "(+3.12 %); the tolerance is 2 %" in text
    assert text.endswith("again: " + command(Case(Path("runs.jsonl"), 3, RUN), "analytic"))


def test_phases_have_a_tolerance_of_their_own() -> None:
    """The engine states a quarter of its peak in forward: 8 GiB against 7.5 measured is + 6.67 %."""
    peaks = {**overall(allocated=32 * GIB), "by_phase": {"forward": {"allocated": 15 * GIB // 2}}}
    with engine_that_states(32 * GIB):
        loose = checked(
            stored.Baseline(), run_record=record(peaks=peaks, tolerance={"analytic": {"allocated": 1.0, "phases": 7.0}})
        )
        tight = checked(
            stored.Baseline(), run_record=record(peaks=peaks, tolerance={"analytic": {"allocated": 1.0, "phases": 6.0}})
        )
    assert loose.failures == ()
    assert [failure.what.partition(":")[0] for failure in tight.failures] == ["forward"]


def test_what_the_source_rounded_is_granted() -> None:
    """32 GiB printed in whole GiB may be 31.5 to 32.5: 1.56 % besides the 2 %."""
    rounded = record(peaks={**overall(allocated=32 * GIB), "rounding_bytes": GIB}, tolerance={"analytic": {"allocated": 2.0}})
    with engine_that_states(33 * GIB):
        assert checked(stored.Baseline(), run_record=rounded).failures == ()
    with engine_that_states(34 * GIB):
        assert len(checked(stored.Baseline(), run_record=rounded).failures) == 1


def test_moves_against_the_baseline(tmp_path: Path) -> None:
    untolerated = record(peaks=overall(allocated=32 * GIB))
    with engine_that_states(32 * GIB):
        before = checked(stored.Baseline(), run_record=untolerated)
    assert before.new == 1
    file = tmp_path / "baseline.json"
    stored.save(stored.updated(stored.Baseline(), "analytic", before.answers, versions={"peftplan": "0"}), file)
    with engine_that_states(32 * GIB):
        same = checked(stored.load(file), run_record=untolerated)
    assert (same.failures, same.new) == ((), 0)
    with engine_that_states(32 * GIB + 4 * MIB):  # 4 / 32768 = 0.012 %, just above what is reported
        (failure,) = checked(stored.load(file), run_record=untolerated).failures
    assert failure.kind == "baseline"
    assert failure.what == ("allocated: 34,359,738,368 bytes (+0.00 %) in the baseline, 34,363,932,672 (+0.01 %) now")
    with engine_that_states_nothing():
        (failure,) = checked(stored.load(file), run_record=untolerated).failures
    assert failure.what == "allocated: 34,359,738,368 bytes (+0.00 %) in the baseline, none now"


def test_loading_counts_only_where_the_record_covers_it() -> None:
    peaks = with_peak(8 * GIB)
    loading = replace(peaks, ledgers={**peaks.ledgers, "load": with_peak(10 * GIB).ledgers["backward"]})

    def stating(*args: Any, **kwargs: Any) -> Estimate:
        return replace(estimate(*args, **kwargs), peaks=loading)

    with patch.object(engines, "estimate", stating):
        assert ask(record(), "analytic").figures["allocated"] == 8 * GIB
        assert ask(record(covers="training"), "analytic").figures["allocated"] == 8 * GIB
        assert ask(record(covers="whole-run"), "analytic").figures["allocated"] == 10 * GIB


def test_device_bytes_are_reserved_bytes_and_the_measured_context() -> None:
    known = record(peaks={**overall(reserved=9 * GIB), "device_bytes": 10 * GIB, "context_bytes": 300 * MIB})
    with engine_that_states(8 * GIB, reserved=9 * GIB):
        assert ask(known, "analytic").figures["device"] == 9 * GIB + 300 * MIB


def test_an_estimate_without_peaks_states_none() -> None:
    with engine_that_states_nothing():
        stated = ask(record(), "analytic")
    assert stated.figures == {}
    assert stated.trainable == 19_988_480


def test_a_missing_extra_is_no_answer_of_the_trace_engine() -> None:
    def lacking(*args: Any, **kwargs: Any) -> Estimate:
        raise MissingExtraError("this", "trace")

    with patch.object(engines, "estimate", lacking):
        with pytest.raises(MissingExtraError):
            ask(record(), "trace")
        stated = ask(record(), "analytic")
    assert stated.lacks_extra
    before = Stated(trainable=1, figures={"allocated": 1})
    assert stored.moves(Answer(Case(Path("x"), 1, record()), stated), before) == []


def test_a_bug_on_one_record_fails_the_check_and_stops_nothing() -> None:
    def sometimes(model: str, **kwargs: Any) -> Estimate:
        if kwargs["r"] == 9:
            raise ZeroDivisionError("division by zero")
        return estimate(model, **kwargs)

    bad = record(id="bad", run={**PAYLOAD["run"], "method_config": {"r": 9}})
    with patch.object(engines, "estimate", sometimes):
        result = check([Case(Path("x"), 1, bad), Case(Path("x"), 2, record())], "analytic", baseline=stored.Baseline())
    (failure,) = [failure for failure in result.failures if failure.kind == "crash"]
    assert failure.what == "crashed: ZeroDivisionError: division by zero"
    assert result.answers[1].stated.trainable == 19_988_480


def test_a_baseline_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    assert stored.load(file, may_be_new=True) == stored.Baseline()
    with pytest.raises(PeftplanError, match=r"baseline\.json"):
        stored.load(file)
    file.write_text('{"schema_version": 1, "engines": {"analytic": {"a": {"peak": 1}}}}')
    with pytest.raises(PeftplanError, match="peak"):
        stored.load(file)


def test_a_sample_is_drawn_by_its_seed() -> None:
    cases = [Case(Path("x"), line, record(id=str(line))) for line in range(50)]
    drawn = sampled(cases, number=5, seed=3)
    assert drawn == sampled(cases, number=5, seed=3)
    assert len(drawn) == 5
    assert drawn != sampled(cases, number=5, seed=4)
    assert [case.line for case in drawn] == sorted(case.line for case in drawn)
    assert sampled(cases, number=None, seed=0) == sampled(cases, number=99, seed=0) == cases


def test_what_ships_can_be_read_and_is_told_apart() -> None:
    cases = read_cases([])
    ids = [case.record.id for case in cases]
    assert len(ids) == len(set(ids))
    assert {path.stem for path in record_files()} >= {"fitcheck_t4", "fms_acceleration", "peft_metamath", "canifinetune"}
    left_out = [json.loads(line) for line in engines.NOT_EXPRESSIBLE.read_text(encoding="utf-8").splitlines()]
    assert all(row["why"] and row["licence"] and row["digest"] == digest(row) for row in left_out)
    published = [record_id for record_id in ids if record_id.startswith("pk")]
    not_records = [row["id"] for row in left_out if row["id"].startswith("pk")]
    # 405 published peaks of one GPU and 428 of several: each is a record or is left out with its reason; peft's benchmark has 31
    assert len(published) + len(not_records) == 405 + 428
    assert not {row["id"] for row in left_out} & set(ids)
    assert sum(record_id.startswith("peft/") for record_id in ids) == 31


def test_every_published_rank_is_a_record_or_left_out_with_its_reason() -> None:
    """431 rows of torchtitan, torchao, torchtune, fsdp_qlora, fms-acceleration, ms-swift, litgpt and others: 145 are records."""
    rows = (Path(__file__).parent / "data" / "published_ranks.txt").read_text(encoding="utf-8").split()
    records = {case.record.id for case in read_cases([]) if case.record.run.strategy is not None}
    left_out = {json.loads(line)["id"] for line in engines.NOT_EXPRESSIBLE.read_text(encoding="utf-8").splitlines()}
    assert (len(rows), len(set(rows)), len(records)) == (431, 431, 145)
    assert records < set(rows)
    assert set(rows) - records <= left_out


def test_junit_fails_what_failed_and_skips_what_has_no_number() -> None:
    with engine_that_states(33 * GIB):
        result = checked(stored.Baseline())
    suite = ElementTree.fromstring(accuracy.junit(result).partition("\n")[2])
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("1", "1", "0")
    assert "tolerance is 2 %" in (suite.find("testcase/failure").get("message") or "")  # type: ignore[union-attr]
    with engine_that_states_nothing():
        none = checked(stored.Baseline())
    suite = ElementTree.fromstring(accuracy.junit(none).partition("\n")[2])
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    path = tmp_path / "runs.jsonl"
    append(path, [RUN])
    return path


def test_the_command_fails_on_a_wrong_formula(runs: Path, tmp_path: Path) -> None:
    base = str(tmp_path / "baseline.json")
    with engine_that_states(32 * GIB):
        assert run("check", str(runs), "--baseline", base, "--update-baseline").code == 0
        good = run("check", str(runs), "--baseline", base, columns=None)
        assert good.code == 0
        assert "1 with a stated peak" in good.out
    with engine_that_states(34 * GIB):
        bad = run("check", str(runs), "--baseline", base, columns=None)
    assert bad.code == 1
    assert "tolerance: example" in bad.out
    assert "baseline: example" in bad.out
    assert "--update-baseline` stores what is stated now" in bad.out


@pytest.fixture
def t4(tmp_path: Path) -> list[str]:
    """A check of ten shipped T4 runs against a baseline of now, so that nothing but what a test breaks can have moved."""
    runs = tmp_path / "t4.jsonl"
    runs.write_text("".join((engines.RUNS / "fitcheck_t4.jsonl").read_text().splitlines(keepends=True)[:10]))
    args = ["check", str(runs), "--baseline", str(tmp_path / "baseline.json")]
    run(*args, "--update-baseline")
    done = run(*args, columns=None)
    assert "Nothing changed against the baseline" in done.out
    assert done.code == 0
    return args


def test_a_wrong_count_makes_the_check_fail(t4: list[str]) -> None:
    """LoRA's B as wide as its input: right for the square q and o of a model, wrong for its grouped k and v."""
    from peftplan import methods
    from peftplan.methods import lora

    wrong = patch.object(lora, "_features", lambda module: (module.in_features, module.in_features))
    with wrong, patch.object(methods, "_ADAPTED", deque(maxlen=1)):
        done = run(*t4, columns=None)
    assert done.code == 1
    # Qwen2.5-1.5B: q and o are 1536 × 1536, k and v 1536 × 256; r 32 in 28 layers: 32·28·(4·2·1536) = 11,010,048
    assert "count: pk01155" in done.out
    assert "trainable parameters: stated 11,010,048, printed by the run 8,716,288 (+26.3158 %)" in done.out


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_says_the_drift(runs: Path, tmp_path: Path, fmt: str) -> None:
    (tmp_path / "empty.json").write_text(stored.Baseline().model_dump_json(), encoding="utf-8")
    with engine_that_states(33 * GIB):
        done = run("check", str(runs), "--format", fmt, "--baseline", str(tmp_path / "empty.json"), columns=None)
    assert done.code == 1
    assert "+3.12 %" in done.out
    if fmt == "json":
        facts = json.loads(done.out)
        assert facts["rows"][0]["figures"] == [
            {"peak": "allocated", "measured": 32 * GIB, "stated": 33 * GIB, "drift_percent": 3.125}
        ]
        assert facts["failures"][0]["line"] == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--engine", "guess"], "engine: 'guess' is not valid"),
        (["--format", "csv"], "format: 'csv' is not valid"),
        (["--id", "exampel"], "did you mean example?"),
        (["--sample", "0"], "--sample"),
    ],
)
def test_bad_input_is_one_line(runs: Path, args: list[str], message: str) -> None:
    done = run("check", str(runs), *args)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_bad_file_is_refused_with_its_line_and_repaired(runs: Path) -> None:
    runs.write_text(runs.read_text() + '{"half')
    done = run("check", str(runs))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"{runs}:2: truncated" in done.err
    assert run("check", str(runs), "--repair").code == 0
    assert len(read_cases([runs])) == 1
    assert run("check", "--repair").code == 2
    assert run("check", "no-such-file.jsonl").code == 2


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_keep_within_the_terminal(columns: int) -> None:
    """A group's name stands above its lines, so that no number is cut."""
    done = run("check", str(engines.RUNS / "canifinetune.jsonl"), columns=columns)
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= columns
    at = lines.index("canifinetune RTX 4080 baselines (open)")
    assert lines[at + 1].split()[:2] == ["allocated", "10"]
    assert ("pk" in lines[at + 1]) is (columns == 120)
    assert len([word for word in lines[at + 1].split() if word == "%"]) == 3


@pytest.mark.parametrize(
    ("versions", "script", "torch"),
    [
        ({"torch": "2.10.0"}, {}, "2.10.0"),
        ({"torch": "2.14.0"}, {"torch": "2.10.0"}, "2.10.0"),
        ({"torch": "of main"}, {}, None),
        ({}, {}, None),
    ],
)
def test_a_record_is_asked_with_the_torch_that_ran(versions: dict[str, str], script: dict[str, Any], torch: str | None) -> None:
    calls: list[dict[str, Any]] = []

    def noting(*args: Any, **kwargs: Any) -> Estimate:
        calls.append(kwargs)
        return estimate(*args, **kwargs)

    ran = record(run={**PAYLOAD["run"], "script": script}, circumstances={**PAYLOAD["circumstances"], "versions": versions})
    with patch.object(engines, "estimate", noting):
        assert not ask(ran, "analytic").crashed
    assert calls[0]["script"].torch == torch
    same = engines.same_answer(ran) == engines.same_answer(record())  # which ran on 2.13.0, as today's
    assert same == (torch is None)


def test_what_ran_twice_is_asked_once() -> None:
    calls: list[dict[str, Any]] = []

    def counting(*args: Any, **kwargs: Any) -> Estimate:
        calls.append(kwargs)
        return estimate(*args, **kwargs)

    runs = [record(id="a"), record(id="b", peaks=overall(allocated=1)), record(id="c", covers="whole-run")]
    with patch.object(engines, "estimate", counting):
        result = check([Case(Path("x"), line, one) for line, one in enumerate(runs)], "analytic", baseline=stored.Baseline())
    assert len(calls) == 2
    assert [answer.record.id for answer in result.answers] == ["a", "b", "c"]


def test_a_check_of_ranks_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from peftplan.report import accuracy_terminal

    cases = read_cases([record_files()[-1].with_name("ms_swift_ranks.jsonl")])
    result = check(cases, "analytic", baseline=stored.Baseline())
    for width in (80, 100, 140):
        monkeypatch.setenv("COLUMNS", str(width))
        accuracy_terminal.check(result)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        at = lines.index("several GPUs")
        assert lines[at + 1].startswith("strategy ")
        assert set(lines[at + 2]) == {"─"}
