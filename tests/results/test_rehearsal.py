"""A rehearsal's exit code, JSON and text."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from peftplan.accuracy import jsonl
from peftplan.accuracy.engines import ask
from peftplan.accuracy.jsonl import append
from peftplan.measure.rehearsed import record_of
from peftplan.planning.verdicts import find_cards
from peftplan.rehearse.program import _verdict
from peftplan.report import render
from peftplan.report.rehearsal import facts, rows
from peftplan.report.screen import ASCII, UNICODE, Screen
from peftplan.results.rehearsal import Alive, OutOfMemory, Rank, Rehearsal, Step
from peftplan.units import GIB

PHASES = {"load": 2 * GIB, "forward": 3 * GIB, "backward": 4 * GIB, "step": 3 * GIB}
LARGEST = Alive("/x/site-packages/transformers/models/llama/modeling_llama.py", 164, "forward", GIB, 3, "activations")
RANK = Rank(
    rank=0,
    device=0,
    peak_allocated=4 * GIB,
    peak_reserved=5 * GIB,
    device_total=5 * GIB + 2**28,
    peak_by_phase=PHASES,
    reserved_by_phase=PHASES,
    steps=tuple(Step(number, PHASES) for number in (1, 2, 3)),
    by_category={"weights": 2 * GIB, "activations": 2 * GIB},
    largest=(LARGEST,),
    cache_released=0,
    host={"pinned": 3 * GIB, "pageable": 0},
)
OOM = OutOfMemory(0, 0, "backward", 1, 2**20, 4 * GIB, "/home/me/train.py", 31, "loss.backward()", (LARGEST,))
CARD = find_cards("24GiB")[0]


def rehearsal(rank: Rank = RANK, *, oom: OutOfMemory | None = None, ended: str = "steps", code: int = 0) -> Rehearsal:
    verdict = _verdict(CARD, [rank], [] if oom is None else [oom], steps=3)
    return Rehearsal(("python", "train.py"), ended, code, 3, (rank,), oom, (verdict,), ("network: there was none",), (), 1.0)


@pytest.mark.parametrize(
    ("ended", "program_exit", "code"),
    [
        ("steps", 0, 0),
        ("steps", 1, 0),
        ("program", 0, 0),
        ("program", 3, 3),
        ("program", -9, 137),
        ("out_of_memory", 1, 1),
        ("timeout", -15, 1),
        ("host_memory", -15, 1),
    ],
)
def test_exit_codes(ended: str, program_exit: int, code: int) -> None:
    assert rehearsal(ended=ended, code=program_exit).exit_code == code


def test_json_has_the_words_of_the_other_engines() -> None:
    stated = json.loads(json.dumps(rehearsal().to_dict()))
    assert (stated["engine"], stated["peak_allocated"], stated["peak_reserved"]) == ("rehearsed", 4 * GIB, 5 * GIB)
    assert stated["ranks"][0]["peak_by_phase"] == PHASES
    assert stated["gpus"][0]["verdict"] == "fits"
    assert facts(rehearsal())[0]["peak_backward"] == 4 * GIB


@pytest.mark.parametrize("fmt", ["csv", "markdown"])
def test_ranks_of_which_one_never_stepped_are_rows_of_one_table(fmt: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(RANK, rank=1, peak_by_phase={"load": 2 * GIB}, host={})
    render.rehearsal(replace(rehearsal(), ranks=(RANK, other)), fmt=fmt)
    separator, lines = (",", 3) if fmt == "csv" else (" | ", 4)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines
    assert len({line.count(separator) for line in printed}) == 1
    assert printed[0].strip("| ").split(separator)[-1] == "peak_step"
    render.rehearsal(replace(rehearsal(), ranks=()), fmt=fmt)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("rank", "oom", "word"),
    [
        (RANK, None, "fits"),
        (replace(RANK, cache_released=2), None, "tight"),
        (replace(RANK, peak_reserved=22 * GIB + GIB // 2), None, "tight"),
        (RANK, OOM, "does_not_fit"),
    ],
)
def test_verdicts(rank: Rank, oom: OutOfMemory | None, word: str) -> None:
    assert rehearsal(rank, oom=oom).gpus[0].verdict == word


def test_what_was_requested_in_vain_counts_on_its_own_device() -> None:
    """The first GPU reserved 20 GiB; the second had 5, of which 1 GiB was cached and given back, and was asked for 22."""
    ranks = (replace(RANK, peak_reserved=20 * GIB), replace(RANK, device=1))
    verdict = _verdict(CARD, ranks, [replace(OOM, device=1, requested_bytes=22 * GIB)], steps=3)
    assert verdict.needed_bytes == 26 * GIB + verdict.context_bytes


@pytest.mark.parametrize("screen", [Screen(80, UNICODE), Screen(100, ASCII)])
def test_the_answer_comes_first_and_fits_the_screen(screen: Screen) -> None:
    lines = ["".join(part.text for part in row) for row in rows(rehearsal(), screen)]
    assert "left of 24.0 GiB" in lines[1]
    assert any(line.endswith("llama/modeling_llama.py:164 in forward") for line in lines)
    assert max(map(len, lines)) <= screen.columns


def test_out_of_memory_names_the_line_that_asked() -> None:
    text = "\n".join(
        "".join(part.text for part in row) for row in rows(rehearsal(oom=OOM, ended="out_of_memory"), Screen(100, UNICODE))
    )
    assert "train.py:31: loss.backward()" in text
    assert "requested 1.00 MiB more in backward, step 1, rank 0" in text


def test_what_was_alive_is_said_once() -> None:
    """Blocks that are alive now have the sizes that the allocator rounded, those of the peak the sizes that were asked for."""
    assert RANK.largest == OOM.alive
    for size, times in ((GIB, 1), (GIB + 512, 1), (1, 2)):
        oom = replace(OOM, alive=(replace(LARGEST, bytes=size),))
        shown = rows(rehearsal(oom=oom, ended="out_of_memory"), Screen(100, UNICODE))
        assert sum("by the line that allocated it:" in part.text for row in shown for part in row) == times


def test_a_record_says_the_job_that_was_stated_and_what_was_rehearsed(tmp_path: Path) -> None:
    result = replace(rehearsal(), versions={"torch": "2.13.0", "transformers": "5.24.0"}, world_size=8)
    record = record_of("qwen2.5-0.5b", result, method="lora", r=4, trainer="trl", batch_size=2)
    append(tmp_path / "runs.jsonl", [record])
    (read,) = jsonl.read(tmp_path / "runs.jsonl")
    assert (read.outcome, read.peaks.overall.reserved, read.peaks.by_phase["backward"].allocated) == ("ok", 5 * GIB, 4 * GIB)
    assert (read.circumstances.versions["torch"], read.circumstances.num_gpus) == ("2.13.0", 8)
    assert (read.run.method_config, read.run.options["trainer"]) == ({"r": 4}, "trl")
    assert ask(read, "analytic").figures["allocated"] > 0
    assert "train.py" not in (tmp_path / "runs.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("ended", "oom", "outcome"), [("out_of_memory", OOM, "oom"), ("timeout", None, "failed"), ("program", None, "failed")]
)
def test_a_run_that_did_not_end_well_is_a_record_too(ended: str, oom: OutOfMemory | None, outcome: str) -> None:
    record = record_of("qwen2.5-0.5b", rehearsal(oom=oom, ended=ended, code=1), method="lora")
    assert (record.outcome, record.error) == (outcome, f"{ended} after 3 steps")


def test_text_of_a_program_that_could_not_say_what_was_alive() -> None:
    killed = replace(RANK, by_category={}, largest=(), host={})
    shown = ["".join(part.text for part in row) for row in rows(rehearsal(killed, ended="program", code=-9), Screen(80, ASCII))]
    assert any(line.startswith("peak 4.00 GiB in backward") for line in shown)
    assert not any("by the line that allocated it" in line for line in shown)
    assert ("", "") not in list(itertools.pairwise(shown))
