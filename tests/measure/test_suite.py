"""Suites in real processes on the double: one record per run whatever becomes of its process; a resume repeats nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.measure.tiny import TINY

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peftplan
from peftplan.accuracy.jsonl import RecordFileError, read
from peftplan.datafiles import DATA
from peftplan.errors import InputError
from peftplan.measure.suite import pending, read_suite
from tests.cli.run import run

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = (sys.executable, "-m", "tests.measure.on_cpu")
ENVIRONMENT = {**os.environ, "HF_DEACTIVATE_ASYNC_LOAD": "1", "OMP_NUM_THREADS": "1"}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "suite.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def tiny(folder: Path, name: str) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(TINY), encoding="utf-8")
    return str(path)


def started(*args: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        (*ON_CPU, "measure", *args), cwd=ROOT, env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, text=True
    )


def test_a_crash_and_an_oom_are_recorded_and_lose_nothing(tmp_path: Path) -> None:
    """Three runs: one dies of a signal, one does not fit the card, and the last one still runs."""
    dies, real, quick = (tiny(tmp_path, name) for name in ("dies", "real", "quick"))
    suite = written(
        tmp_path,
        {"model": dies, "seq_len": 8},
        {"model": real, "seq_len": 512, "batch_size": 64},
        {"model": quick, "seq_len": 8, "method": "ia3"},
    )
    output = tmp_path / "runs.jsonl"
    process = started("--suite", str(suite), "--output", str(output), DOUBLE_CAPACITY=str(20 * 2**20))
    text, _ = process.communicate()
    assert process.returncode == 1
    records = read(output)
    assert [record.outcome for record in records] == ["failed", "oom", "ok"]
    assert records[0].error == "killed by signal 11"
    lines = text.splitlines()
    assert [line.partition("]")[0] for line in lines[:3]] == ["[1/3", "[2/3", "[3/3"]
    assert "ia3 ok  allocated" in lines[2]
    assert "1 ok, 1 oom, 1 failed" in lines


def test_a_run_that_hangs_is_recorded_and_ended(tmp_path: Path) -> None:
    suite = written(tmp_path, {"model": tiny(tmp_path, "hangs")})
    output = tmp_path / "runs.jsonl"
    process = started("--suite", str(suite), "--output", str(output), "--timeout", "0.5")
    process.communicate()
    (record,) = read(output)
    assert (process.returncode, record.outcome, record.error) == (1, "failed", "still running after 0.5 s")


def test_a_killed_suite_resumes_where_it_stopped(tmp_path: Path) -> None:
    model = tiny(tmp_path, "quick")
    lengths = list(range(8, 15))
    suite = written(tmp_path, *({"model": model, "seq_len": length} for length in lengths))
    output = tmp_path / "runs.jsonl"
    first = started("--suite", str(suite), "--output", str(output))
    deadline = time.monotonic() + 60
    while not output.exists() or output.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(1)  # its child notices and leaves
    before = read(output)
    assert 2 <= len(before) < len(lengths)
    again = started("--suite", str(suite), "--output", str(output))
    text, _ = again.communicate()
    assert again.returncode == 0
    assert text.splitlines()[0] == f"{len(before)} of {len(lengths)} runs are in {output} already"
    assert text.splitlines()[1].startswith(f"[{len(before) + 1}/{len(lengths)}]")
    after = read(output)
    assert after[: len(before)] == before
    assert [record.run.options["seq_len"] for record in after] == lengths


def test_a_child_leaves_when_its_suite_has_gone(tmp_path: Path) -> None:
    """Otherwise it would still hold the GPU while the resumed suite measures."""
    order = {"model": tiny(tmp_path, "model"), "options": {}, "output": str(tmp_path / "x"), "warmup": 1, "steps": 1}
    hanging = (
        "import time; from peftplan.measure import child; child.measure_and_record = lambda *a, **k: time.sleep(60); child.main()"
    )
    process = subprocess.Popen((sys.executable, "-c", hanging), cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(json.dumps(order).encode() + b"\n")
    process.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.stdin.close()
    assert process.wait(30) == 3


def test_one_record_per_rank_appended_at_once(tmp_path: Path) -> None:
    """Two processes with the variables that torchrun sets, over gloo: each measures its own replica, and neither record is lost,
    though both end with the same step."""
    model, output = tiny(tmp_path, "model"), tmp_path / "runs.jsonl"
    ranks = [
        started(
            model, "--seq-len", "8", "--output", str(output),
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29517",
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in ranks:
        process.communicate()
        assert process.returncode == 0
    records = read(output)
    assert sorted((r.circumstances.rank, r.circumstances.num_gpus) for r in records) == [(0, 2), (1, 2)]
    assert len({record.id for record in records}) == 2
    assert {record.run.strategy for record in records} == {"ddp"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON object with a model"),
        ('{"method": "lora"}', "a JSON object with a model"),
        ('{"model": "gpt2", "methd": "lora"}', "methd"),
        ('{"model": "gpt2", "seq_len": 0}', "seq_len"),
        ('{"model": "gpt2", "output": "x"}', "output is set for the whole suite"),
        ('{"model": "gpt2", "seq_len": 1024}', "the same configuration as line 1"),
        ('{"model": "gtp2"}', "gtp2"),
    ],
    ids=["json", "list", "no-model", "unknown-option", "bad-value", "output", "twice", "unknown-model"],
)
def test_a_corrupt_suite_is_refused_with_the_line(tmp_path: Path, line: str, why: str) -> None:
    path = written(tmp_path, {"model": "gpt2"}, line)
    with pytest.raises(RecordFileError, match=r"suite\.jsonl:2: ") as caught:
        read_suite(path)
    assert why in str(caught.value)
    done = run("measure", "--suite", str(path))
    assert done.code == 2
    assert len(done.err.splitlines()) == 1


def test_an_empty_or_missing_suite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="JSON Lines"):
        read_suite(written(tmp_path, ""))
    with pytest.raises(InputError, match="cannot read"):
        read_suite(tmp_path / "none.jsonl")


def test_a_corrupt_output_is_refused_before_anything_runs(tmp_path: Path) -> None:
    output = tmp_path / "runs.jsonl"
    output.write_text("{}\n")
    with pytest.raises(RecordFileError, match=r"runs\.jsonl:1: "):
        pending(read_suite(written(tmp_path, {"model": "gpt2"})), output)


@pytest.mark.parametrize(
    "args",
    [("gpt2",), ("--suite", "default"), ("gpt2", "--method", "qlora", "--snapshot", "x")],
    ids=" ".join,
)
def test_without_cuda_one_line_and_exit_2(args: tuple[str, ...], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run("measure", *args, "--output", str(tmp_path / "runs.jsonl"))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("peftplan: measure needs a CUDA GPU, and ")
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((), "MODEL"),
        (("gpt2", "--suite", "default"), "--suite"),
        (("gpt2", "--engine", "measure"), "engine"),
        (("gpt2", "--methd", "lora"), "--method"),
        (("gpt2", "--method", "lorra"), "lora"),
        (("gpt2", "--steps", "many"), "steps"),
    ],
    ids=["nothing", "both", "engine", "option", "method", "steps"],
)
def test_bad_input_is_one_line(args: tuple[str, ...], why: str) -> None:
    done = run("measure", *args)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert why in done.err


def test_every_configuration_of_the_default_suite_can_be_estimated() -> None:
    """And all but the one that is made not to fit do fit one card of 80 GB, as far as the engine can tell."""
    entries = read_suite(DATA / "suites" / "default.jsonl")
    estimates = [peftplan.estimate(entry.model, gpu="h100-80gb", **entry.options) for entry in entries]
    assert [estimate.gpus[0].verdict for estimate in estimates].count("does_not_fit") == 1
    assert estimates[-1].gpus[0].verdict == "does_not_fit"


def test_the_default_suite_is_what_it_says() -> None:
    """30 to 60 configurations that peftplan can estimate, over architectures, methods, dtypes, trainers and sizes."""
    entries = read_suite(DATA / "suites" / "default.jsonl")
    assert 30 <= len(entries) <= 60
    options = [entry.run.options for entry in entries]
    for name, wanted in {
        "trainer": {"plain", "transformers", "trl", "qlora-paper"},
        "dtype": {"bf16", "fp16", "fp32"},
        "autocast": {"none", "bf16"},
        "attn_implementation": {"sdpa", "eager"},
        "gradient_checkpointing": {True, False},
        "keep_outputs": {True, False},
        "padding": {True, False},
        "kbit_prepare": {True, False},
    }.items():
        assert wanted <= {option[name] for option in options}, name
    assert {"adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd", "adafactor"} <= {
        option["optim"] for option in options
    }
    assert {"lora", "qlora", "dora", "ia3", "prefix-tuning", "full", "lora-fa", "adalora", "vera"} <= {
        entry.run.method for entry in entries
    }
    assert {"nf4", "fp4", "int8"} <= {option.get("quant") for option in options}
