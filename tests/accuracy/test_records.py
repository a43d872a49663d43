"""Record files: what is refused, with the line; what two writers at once leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.accuracy.engines import read_cases
from peftplan.accuracy.jsonl import RecordFileError, append, digest, read, repair, to_line
from peftplan.errors import PeftplanError
from tests.accuracy.example import OPTIONS, PAYLOAD, record


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "runs.jsonl"
    path.write_bytes("".join(lines).encode())
    return path


def signed(payload: dict[str, Any]) -> str:
    """A line whose digest is right, so that only its content can be refused."""
    return json.dumps({**payload, "digest": digest(payload)}) + "\n"


GOOD = to_line(record())


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    full = record(
        id="ünïcode",
        kept_alive=("outputs",),
        steps=({"step": 1, "allocated": 5, "seconds": 0.25},),
        counts={"trainable": 1, "total": 2},
        tolerance={"trace": {"allocated": 1.5}},
        unknown=("driver",),
    )
    append(path, [record()])
    append(path, [full, record(outcome="oom", peaks={})])
    assert read(path) == [record(), full, record(outcome="oom", peaks={})]


def test_a_record_of_a_rank_is_asked_with_its_strategy() -> None:
    """Of two ranks of FSDP2, each holds half of the weights of Llama 2 7B in bf16."""
    run, where = PAYLOAD["run"], PAYLOAD["circumstances"]
    ranks = {**run, "distributed": {"gpus": 2, "strategy": "fsdp2"}}
    whole, half = record(), record(run=ranks, circumstances={**where, "num_gpus": 2})
    assert (whole.run.strategy, half.run.strategy) == (None, "fsdp2")
    weights = [peftplan.estimate(one.run.model, **one.run.arguments()).static.by_category()["weights"] for one in (whole, half)]
    assert weights == [2 * 6_738_415_616, 6_738_415_616]


def test_the_digest_is_sha256_of_the_canonical_json() -> None:
    """Witness: `printf '{"a":[1,"é"],"b":null}' | sha256sum`."""
    expected = "1e02bc81a26af2f027329541e97eef36f3290bedc6dfe043dbe66b057ecb13ba"
    assert digest({"b": None, "digest": "any", "a": [1, "é"]}) == expected


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("{\n", "not JSON"),
        ("\n", "not JSON"),
        ("[1]\n", "not a JSON object"),
        ("null\n", "not a JSON object"),
        (signed({**PAYLOAD, "schema_version": 2}), "schema_version is 2; this version of peftplan reads 1"),
        (signed({k: v for k, v in PAYLOAD.items() if k != "schema_version"}), "schema_version is None"),
        (signed({**PAYLOAD, "schema_version": True}), "schema_version is True"),
        (signed({**PAYLOAD, "speed": 3}), "speed: 3"),
        (
            signed({**PAYLOAD, "outcome": "fine"}),
            "outcome: 'fine' is not valid; did you mean failed?",
        ),
        (
            signed({**PAYLOAD, "peaks": {"overall": {"allocated": "15"}}}),
            "allocated must be a whole number (got '15')",
        ),
        (signed({**PAYLOAD, "peaks": {"overall": {"allocated": -1}}}), "peaks.overall.allocated must be at least 0 (got -1)"),
        (
            signed({**PAYLOAD, "peaks": {"overall": {"allocated": 1.5}}}),
            "allocated must be a whole number (got 1.5)",
        ),
        (signed({**PAYLOAD, "peaks": {"overall": {"allocated": 10**30}}}), "allocated must be at most 9,223,372,036,854,775,807"),
        (signed({**PAYLOAD, "peaks": {}}), "at least one overall peak"),
        (signed({**PAYLOAD, "run": {**PAYLOAD["run"], "options": {**OPTIONS, "seqlen": 1}}}), "did you mean seq_len?"),
        (
            signed({**PAYLOAD, "run": {**PAYLOAD["run"], "options": {k: v for k, v in OPTIONS.items() if k != "optim"}}}),
            "missing: optim",
        ),
        (signed({**PAYLOAD, "run": {"model": "gpt2", "options": OPTIONS}}), "either method or peft_config"),
        (signed({**PAYLOAD, "run": {**PAYLOAD["run"], "distributed": {"gpus": 1}}}), "gpus (2 or more) and strategy"),
        (signed({**PAYLOAD, "run": {**PAYLOAD["run"], "distributed": {"gpus": 2}}}), "gpus (2 or more) and strategy"),
        (
            signed({**PAYLOAD, "run": {**PAYLOAD["run"], "distributed": {"gpus": 2, "strategy": None}}}),
            "gpus (2 or more) and strategy",
        ),
        (
            signed({**PAYLOAD, "run": {**PAYLOAD["run"], "distributed": {"gpus": 2, "shards": 2}}}),
            "shards: 2 is not valid; there is no field of this name",
        ),
        (
            signed({**PAYLOAD, "run": {**PAYLOAD["run"], "distributed": {"gpus": 2, "strategy": "ddp", "tp_size": 2}}}),
            "DDP has no such parameter",
        ),
        (
            signed({**PAYLOAD, "run": {**PAYLOAD["run"], "distributed": {"gpus": 2, "strategy": "ddp"}}}),
            "circumstances: 'rank 0 of 1' is not valid; run.distributed makes 2 ranks; accepted: one of them",
        ),
        (GOOD.replace('"allocated":15', '"allocated":14'), "the digest does not match"),
        (json.dumps(PAYLOAD) + "\n", "the digest does not match"),
        (GOOD[:-1], "truncated"),
        (GOOD[:40], "truncated"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, bad: str, why: str) -> None:
    path = written(tmp_path, GOOD, GOOD, bad)
    with pytest.raises(RecordFileError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}:3: ")
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes(GOOD.encode() + b"\xff\n")
    with pytest.raises(RecordFileError, match=":2: not UTF-8"):
        read(path)
    with pytest.raises(PeftplanError, match="No such file"):
        read(tmp_path / "none.jsonl")


def test_nothing_is_added_behind_half_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD, GOOD[:100])
    with pytest.raises(RecordFileError, match=":2: truncated"):
        append(path, [record()])
    assert path.read_text() == GOOD + GOOD[:100]
    assert repair(path) == 100
    assert Path(f"{path}.cut").read_text() == GOOD[:100] + "\n"
    append(path, [record(id="next")])
    assert [one.id for one in read(path)] == ["example", "next"]
    assert repair(path) == 0


def test_a_whole_record_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD, GOOD[:-1])
    assert repair(path) == 0
    assert len(read(path)) == 2


WRITER = """
import sys
from pathlib import Path
from peftplan.accuracy.jsonl import append
from tests.accuracy.example import record
for number in range(100):
    append(Path(sys.argv[1]), [record(id=f"{sys.argv[2]}-{number}", note="x" * 9000)])
"""


def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    ids = [one.id for one in read(path)]
    assert sorted(ids) == sorted(f"{name}-{number}" for name in "ab" for number in range(100))
    for name in "ab":
        own = [one for one in ids if one.startswith(name)]
        assert own == [f"{name}-{number}" for number in range(100)]


def test_a_figure_is_none_where_it_was_not_read() -> None:
    peaks = record().peaks
    assert (peaks.figure("allocated"), peaks.figure("reserved"), peaks.figure("device")) == (15, None, None)
    assert (peaks.figure("allocated", "forward"), peaks.figure("reserved", "forward")) == (10, 20)
    assert peaks.figure("allocated", "step") is None
    assert peaks.figure("device", "forward") is None


@pytest.mark.parametrize("change", [lambda r: setattr(r, "id", "other"), lambda r: setattr(r.peaks, "device_bytes", 1)])
def test_a_record_is_frozen(change: Callable[[Any], None]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        change(record())


def test_statements_tell_labelled_runs_from_those_whose_stack_was_inferred() -> None:
    """Counted from labels alone: a T4 run keeps its label where the script asks for the versions that the label states."""
    says_all = [case.record for case in read_cases([]) if case.record.exact]
    kept, replaced = [], []
    for one in says_all:
        labelled = {package: one.circumstances.versions[package].partition("+")[0] for package in ("torch", "transformers")}
        ran_with = {package: getattr(one.run.script, package) or labelled[package] for package in labelled}
        (kept if ran_with == labelled else replaced).append(one)
    assert (len(kept), len(replaced)) == (17, 30)
    assert {one.setup for one in kept} == {"as labelled"}
    assert {one.setup for one in replaced} == {"with an inferred stack"}
    by_bytes = [one for one in replaced if any(choice.evidence == "measured bytes" for choice in one.inferred)]
    assert len(by_bytes) == 20


def test_no_label_is_replaced_without_saying_so() -> None:
    for case in read_cases([]):
        versions, script = case.record.circumstances.versions, case.record.run.script
        replaced = [
            package
            for package in ("torch", "transformers")
            if package in versions
            and (version := getattr(script, package)) is not None
            and not versions[package].startswith(version)
        ]
        assert not replaced or case.record.inferred, case.record.id
