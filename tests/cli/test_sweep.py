"""`peftplan sweep`: formats, whole rows on a full disk, grids that are too large, the map."""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftplan import estimate
from tests.cli.run import run

pytest.importorskip("numpy")

GRID = ("sweep", "gpt2", "--batch-size", "1,2", "--seq-len", "256:1024:256", "--gpu", "t4")


def test_csv_and_json_lines_hold_the_same_rows() -> None:
    table, lines = run(*GRID), run(*GRID, "--format", "jsonl")
    rows = list(csv.DictReader(table.out.splitlines()))
    records = [json.loads(line) for line in lines.out.splitlines()]
    assert len(rows) == 8
    assert rows == [{name: "" if value is None else str(value) for name, value in row.items()} for row in records]
    assert "8 rows in" in table.err
    assert "8 points replayed" in table.err


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    stopped = run(*GRID, "--padding", "--no-padding", "--output", str(tmp_path / "grid.parquet"))
    assert stopped.code == 0
    rows = parquet.read_table(tmp_path / "grid.parquet").to_pylist()
    lines = run(*GRID, "--padding", "--no-padding", "--format", "jsonl")
    assert rows == [json.loads(line) for line in lines.out.splitlines()]
    assert {row["padding"] for row in rows} == {True, False}


def test_repeated_options_are_values() -> None:
    stopped = run(
        "sweep", "gpt2", "--target-modules", "c_attn", "--target-modules", "c_attn,c_proj", "--set", "r=4", "--set", "r=8"
    )
    rows = list(csv.DictReader(stopped.out.splitlines()))
    assert [(row["target_modules"], row["r"]) for row in rows] == [
        ("c_attn", "4"), ("c_attn", "8"), ("c_attn,c_proj", "4"), ("c_attn,c_proj", "8"),
    ]  # fmt: skip


def test_a_grid_over_gpus_and_strategies() -> None:
    """Each row is `estimate` of its job; what has no formula says so and is counted apart."""
    grid = ("sweep", "llama-3.2-1b", "--gpus", "2,4", "--strategy", "ddp,fsdp2", "--batch-size", "1,2", "--format", "jsonl")
    stopped = run(*grid, "--gpu", "rtx-4090")
    rows = [json.loads(line) for line in stopped.out.splitlines()]
    assert len(rows) == 8
    for row in rows:
        named = {"gpus": int(row["gpus"]), "strategy": row["strategy"], "batch_size": row["batch_size"]}
        result = estimate("llama-3.2-1b", gpu="rtx-4090", **named)
        assert result.peaks is not None
        assert (row["peak_allocated"], row["peak_reserved"]) == (result.peaks.allocated, result.peaks.reserved)
        assert row["verdict"] == result.gpus[0].verdict
    counted = run("sweep", "llama-3.2-1b", "--gpu", "2xrtx-4090", "--offload-params", "cpu", "--strategy", "ddp,fsdp2")
    assert [(row["gpus"], row["strategy"]) for row in csv.DictReader(counted.out.splitlines())] == [("2", "ddp"), ("2", "fsdp2")]
    assert "2 rows in" in counted.err
    assert "1 without numbers" in counted.err
    assert "DDP has no such parameter" in counted.out


def limited(most: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.parametrize("fmt", ["csv", "jsonl"])
def test_a_full_disk_leaves_whole_rows(fmt: str, tmp_path: Path) -> None:
    """The disk ends after 100,001 bytes, in the middle of a row."""
    for name, stdout in (("file", False), ("stdout", True)):
        output = tmp_path / f"{name}.{fmt}"
        arguments = ["sweep", "gpt2", "--batch-size", "1:64", "--seq-len", "1:1024", "--replays", "0", "--format", fmt]
        with output.open("wb") as file:
            done = subprocess.run(
                [sys.executable, "-m", "peftplan", *arguments, *([] if stdout else ["--output", str(output)])],
                stdout=file if stdout else None, stderr=subprocess.PIPE, text=True, preexec_fn=limited(100_001), check=False,
            )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith("peftplan: ")
        assert "File too large" in done.stderr
        assert "Traceback" not in done.stderr
        text = output.read_text(encoding="utf-8")
        assert 99_000 < len(text) <= 100_001
        assert text.endswith("\n")
        rows: list[dict[str, Any]] = (
            list(csv.DictReader(text.splitlines())) if fmt == "csv" else [json.loads(line) for line in text.splitlines()]
        )
        assert all(None not in row.values() or fmt == "jsonl" for row in rows)
        assert [int(row["seq_len"]) for row in rows] == [1 + at % 1024 for at in range(len(rows))]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_is_one_line() -> None:
    stopped = run(*GRID, "--output", "/dev/full")
    assert stopped.code == 2
    assert stopped.err == "peftplan: /dev/full: No space left on device; the rows written so far are whole\n"


def test_a_parquet_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    arguments = ["sweep", "gpt2", "--batch-size", "1:64", "--seq-len", "1:1024", "--replays", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "peftplan", *arguments, "--output", str(tmp_path / "grid.parquet")],
        stderr=subprocess.PIPE, text=True, preexec_fn=limited(20_000), check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_grid_of_a_thousand_million_points_is_asked_twice() -> None:
    stopped = run("sweep", "gpt2", "--batch-size", "1:1000000", "--seq-len", "1:1000")
    assert stopped.code == 2
    assert "batch size 1,000,000 × seq len 1,000 = 1,000,000,000 rows" in stopped.err
    assert "--yes" in stopped.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--seq-len", "1024:512"), "--seq-len: '1024:512' is not valid; it ends before it begins"),
        (("--bs", "1,,2"), "--bs: '1,,2'"),
        (("--nosuch", "1"), "no such option: --nosuch"),
        (("--format", "xml"), "--format: 'xml'"),
        (("--format", "parquet"), "--output FILE.parquet"),
        (("--output", "/nosuch/folder/grid.csv"), "--output"),
        (("--replays", "some"), "--replays must be a whole number, or all"),
        (("--gpu", "2xl4,4xt4"), "--gpu: this command takes one number of GPUs"),
        (("--gpu", "2xl4", "--gpus", "2,4"), "--gpu says how many there are"),
        (("--plot", "map.gif"), "--plot: 'map.gif'"),
        (("--plot", "map.png", "--r", "4,8"), "several batch sizes or sequence lengths"),
        (("--plot", "map.png", "--r", "1:9", "--batch-size", "1,2"), "9 maps would be drawn (r 9)"),
        (("--plot", "map.png", "--seq-len", "1:1024", "--batch-size", "1:100"), "102,400 points"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], expected: str) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    stopped = run("sweep", "gpt2", *arguments)
    assert stopped.code == 2
    assert expected in stopped.err
    assert stopped.err.count("\n") == 1


def test_a_map_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stopped = run(*GRID, "--method", "lora,full", "--plot", str(tmp_path / "map.svg"))
    assert stopped.code == 0
    assert "<svg" in (tmp_path / "map.svg").read_text(encoding="utf-8")


def test_a_file_that_ends_otherwise_needs_a_format(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    refused = run("sweep", "gpt2", "--output", str(file))
    assert refused.code == 2
    assert "--output: " in refused.err
    assert ".csv, .jsonl, .ndjson, .parquet, or --format beside it" in refused.err
    assert run("sweep", "gpt2", "--output", str(file), "--format", "jsonl").code == 0
    assert json.loads(file.read_text())["model"] == "gpt2"


def test_strategies_may_be_a_list() -> None:
    done = run("sweep", "llama-3.2-1b", "--method", "lora", "--gpus", "2", "--strategy", "ddp,fsdp2", "--format", "csv")
    assert [line.split(",")[2] for line in done.out.splitlines()[1:]] == ["ddp", "fsdp2"]
