"""Input made to break the reader: one line, exit 2, in bounded time and memory. Files from elsewhere are input too."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import peftplan
from peftplan.allocator.pickles import MOST_BYTES, NotPlainError, load
from peftplan.errors import InputError, PeftplanError, UnknownNameError, one_line
from peftplan.report import markdown, tabular
from tests.cli.run import Done, run

MAIN = (sys.executable, "-m", "peftplan")
DIGITS = "9" * 5000


def refused(*args: str) -> str:
    """The one line of a command that is refused."""
    done = run(*args)
    assert done == Done(2, "", done.err)
    assert done.err.startswith("peftplan: ")
    assert done.err.count("\n") == 1
    assert done.err[:-1].isprintable()
    assert len(done.err) <= 1000
    return done.err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("inspect", "gemma-2-2b", "--match", "["), "--match: '[' is not valid; not a regular expression"),
        (("inspect", "gpt2", "--match", "a{99999999999999999999}"), "not a regular expression"),
        (("estimate", "gpt2", "--set", "script=1"), "--set: 'script=1'"),
        (("estimate", "gpt2", "--lora-alpha", "9" * 400, "--format", "json"), "--lora-alpha must be a finite number"),
        (("estimate", "gpt2", "--set", "lora_alpha=1e999"), "--set lora_alpha must be a finite number (got inf)"),
        (("estimate", "gpt2", "--method", "a\x1b[31m\nb\u202e" * 500), "method: 'a\\x1b[31m\\nb\\u202e"),
        (("estimate", "gpt2", f"--{'x' * 5000}"), "no such option"),
        (("estimate", "x" * 5000), "MODEL: 'xxx"),
        (("estimate", "~nobody-of-that-name/config.json"), "no such file or folder"),
        (("replay", "\0"), "cannot read"),
    ],
)
def test_what_ended_in_a_traceback_or_was_taken(args: tuple[str, ...], expected: str) -> None:
    assert expected in refused(*args)


def test_allocator_options_of_any_length(tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    log.write_text('{"format": "peftplan-events", "schema_version": 1, "events": []}')
    assert "at most 15 digits" in refused("replay", str(log), "--alloc-conf", f"max_split_size_mb:{DIGITS}")
    assert "at most 10000 characters" in refused("replay", str(log), "--alloc-conf", "max_split_size_mb:64," * 5000)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ('{"peft_type": "LORA", "task_type": ["CAUSAL_LM"]}', "task_type: ['CAUSAL_LM'] is not valid; accepted: CAUSAL_LM"),
        ('{"peft_type": "LORA", "task_type": "SEQ_CLASS"}', "accepted: CAUSAL_LM, "),  # as peft itself refuses it
        ('{"peft_type": "LORA", "layer_replication": -Infinity}', "layer_replication: -inf"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha: inf"),
    ],
)
def test_adapter_configs(tmp_path: Path, config: str, expected: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(config)
    assert expected in refused("estimate", "llama-2-7b", "--peft-config", str(path))


def test_a_suite_whose_script_is_none(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text('{"model": "gpt2", "script": 3}\n')
    assert ":1: script: 3 is not valid" in refused("measure", "--suite", str(path), "--output", str(tmp_path / "o.jsonl"))


def arguments(**fields: Any) -> SimpleNamespace:
    """What is read of a TrainingArguments."""
    return SimpleNamespace(per_device_train_batch_size=1, **fields)


@pytest.mark.parametrize(
    "call",
    [
        lambda: peftplan.estimate("gpt2", script=1),  # type: ignore[arg-type]
        lambda: peftplan.estimate("gpt2", trainer=[]),  # type: ignore[arg-type]
        lambda: peftplan.estimate("gpt2", training_args=arguments(gradient_checkpointing_kwargs=1)),
        lambda: peftplan.estimate("gpt2", training_args=arguments(model_init_kwargs="[")),
        lambda: peftplan.estimate("gpt2", training_args=arguments(use_liger_kernel=True, liger_kernel_config=3)),
        lambda: peftplan.estimate("gpt2", quantization_config={"load_in_4bit": True, "llm_int8_skip_modules": print}),
        lambda: peftplan.estimate("gpt2", peft_config={"peft_type": "LORA", "r": float("nan")}),
        lambda: peftplan.inspect("gpt2", pattern={}),  # type: ignore[arg-type]
        lambda: peftplan.inspect("gpt2", task_type=[]),  # type: ignore[arg-type]
    ],
)
def test_python_calls_with_odd_objects(call: Callable[[], object]) -> None:
    with pytest.raises(InputError) as raised:
        call()
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) <= 1500


def test_a_message_is_one_line_of_bounded_length_whatever_it_quotes() -> None:
    nest: Any = "x"
    for _ in range(60):
        nest = [nest] * 10  # 10^60 letters in full
    for value in (
        nest,
        int(DIGITS[:4000]),
        10**9999,
        "\x1b[2J\r\n" * 10_000,
        {"a": nest},
        SimpleNamespace(a=nest),
        b"\0" * 10**6,
    ):
        for error in (InputError("field", value, "accepted: else"), UnknownNameError("field", value, ("one", "two"))):
            assert str(error).isprintable()
            assert str(error).startswith("field: ")
            assert "accepted: " in str(error)
            assert len(str(error)) < 300
    long = str(PeftplanError("a" * 10**6 + "\n\x1b" + "z" * 10**6))
    assert len(long) <= 1500
    assert long.startswith("aaa")
    assert long.endswith("zzz")
    assert one_line("two\nlines\x07") == "two lines\\x07"


@pytest.fixture
def endless(tmp_path: Path) -> list[str]:
    """Paths that a reader would wait at, or read for ever."""
    pipe, loop = tmp_path / "pipe", tmp_path / "loop"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    return [str(pipe), str(loop), str(tmp_path), *(["/dev/zero"] if Path("/dev/zero").exists() else [])]


def is_named(line: str) -> bool:
    """Whether an error says what is wrong with a file, or what a model may be."""
    return any(
        reason in line.lower() for reason in ("a pipe or a device", "a directory", "symbolic links", "no such file", "accepted: ")
    )


def test_only_regular_files_are_read(endless: list[str], tmp_path: Path) -> None:
    for path in endless:
        assert is_named(refused("replay", path))
        assert is_named(refused("check", path))
        assert is_named(refused("check", "--repair", path))
        assert is_named(refused("estimate", path))
        assert is_named(refused("estimate", "gpt2", "--peft-config", path))
        assert is_named(refused("measure", "--suite", path))
        if not path.endswith("loop"):  # where a link leads nowhere there is no baseline yet
            assert is_named(refused("check", "--sample", "1", "--baseline", path))
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        (folder / "config.json").symlink_to(path)
        assert is_named(refused("inspect", str(folder)))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a regular file whose first byte cannot be read")
def test_a_file_that_cannot_be_read_is_named() -> None:
    for command in ("replay", "explain-oom", "check", "estimate"):
        assert ": cannot read '/proc/self/mem': Input/output error" in refused(command, "/proc/self/mem")


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(b"\x80\x04")
        file.truncate(MOST_BYTES + 1)  # a hole, which takes no disk
    for command in (("replay",), ("check",), ("measure", "--suite"), ("estimate",)):
        assert "accepted: a file of at most" in refused(*command, str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04]r\xff\xff\xff\x7f.",  # nine bytes: a memo of 2^31 entries
        b"\x80\x04" + b"]" * (2**23 + 1) + b".",  # lists of 72 bytes in a byte each
        b"\x80\x04" + b"\x8f" * 100 + b".",  # sets
        b"\x80\x04\x8d" + b"\xff" * 8 + b".",  # a text of 2^64 bytes
        b"\x80\x04I" + DIGITS.encode() + b"\n.",  # a number in digits
        b"\x80\x04]",  # no end
    ],
)
def test_a_pickle_is_scanned_before_it_runs(content: bytes) -> None:
    with pytest.raises(NotPlainError):
        load(content)


def test_what_python_pickles_of_plain_containers_is_let_through() -> None:
    addresses = [1 << shift for shift in range(62)]
    plain = {
        "text": ["a", "é" * 300, "x" * 70_000],
        "numbers": [0, 255, 65_535, -1, 2**31, 1.5, *addresses],
        "pair": (0, (1, 2, 3, 4)),
    }
    plain |= {"many": [{"frames": [], "flag": True, "none": None, "size": number} for number in range(3000)]}
    for protocol in (2, 3, 4, 5):
        assert load(pickle.dumps(plain, protocol=protocol)) == plain


def test_lists_in_a_name_are_refused(tmp_path: Path) -> None:
    nest: Any = "x"
    for _ in range(100):
        nest = [nest, nest]  # str() of it would never end
    entry = {"action": "alloc", "addr": 1, "size": 512, "stream": 0, "frames": [{"name": nest}]}
    path = tmp_path / "s.pickle"
    for field, value in (("name", None), ("size", nest), ("addr", nest), ("action", nest)):
        damaged = {**entry, "frames": [{"name": nest}]} if value is None else {**entry, field: value}
        path.write_bytes(pickle.dumps({"segments": [], "device_traces": [[damaged]]}))
        started = time.perf_counter()
        assert "FILE: " in refused("replay", str(path))
        assert time.perf_counter() - started < 5
        assert field in refused("replay", str(path))


def test_the_same_entry_many_times_is_refused(tmp_path: Path) -> None:
    entry = {"action": "oom", "size": 512, "stream": 0, "frames": []}
    path = tmp_path / "s.pickle"
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [[entry] * (2**21 + 1)]}))
    assert "at most 2097152 entries" in refused("replay", str(path))
    blocks = [{"address": 1, "state": "inactive"}] * 2**11
    segments = [{"device": 0, "address": 0, "total_size": 2**20, "stream": 0, "blocks": blocks}] * 2**11
    path.write_bytes(pickle.dumps({"segments": segments, "device_traces": [[]]}))
    assert "blocks: 4194304" in refused("replay", str(path))


def test_labels_in_a_config_are_bounded_as_the_option_is(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bert", "num_labels": 2**22 + 1}))
    assert "from 1 to 4194304" in refused("estimate", "bert-base-cased", "--task-type", "SEQ_CLS", "--num-labels", str(2**22 + 1))
    config = json.loads(json.dumps(peftplan.job.sources.load_config("bert-base-cased"))) | {"num_labels": 2**22 + 1}
    path.write_text(json.dumps(config))
    assert "4194304" in refused("estimate", str(path), "--task-type", "SEQ_CLS")


def test_too_little_memory_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_bytes(b'{"format": "peftplan-events", "schema_version": 1, "events": [' + b"[]," * 10**7 + b"[]]}")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (400 * 2**20,) * 2)

    done = subprocess.run((*MAIN, "replay", str(path)), capture_output=True, text=True, preexec_fn=limit, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("peftplan: out of memory")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [(), ("--help",), ("--version",), ("estimate", "--help"), ("models",)], ids=" ".join)
def test_a_reader_that_has_gone_is_no_failure(args: tuple[str, ...]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        done = subprocess.run((*MAIN, *args), stdout=theirs, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(theirs)
    assert (done.returncode, done.stderr) == (0, b"")


def test_cells_are_no_formulas() -> None:
    cells = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "plain", -1, None, ["=a", "b"]]
    stream = io.StringIO(newline="")
    tabular.write_csv([{f"column {number}": cell for number, cell in enumerate(cells)}], stream)
    (row,) = list(csv.reader(io.StringIO(stream.getvalue(), newline="")))[1:]
    assert row == ["'=1+1", "'+1", "'-1", "'@SUM(A1)", "?=1", "?=1", "plain", "-1", "", "'=a;b"]


def test_names_are_no_markup(tmp_path: Path) -> None:
    path = tmp_path / "a|b [x](javascript:y) <img src=z> \x1b[31m.json"
    path.write_text(json.dumps(peftplan.job.sources.load_config("gpt2")))
    shown = run("estimate", str(path), "--format", "markdown").out
    heading = shown.splitlines()[0]
    assert heading.startswith("## ")
    for escaped in ("a\\|b", "\\[x\\](", "\\<img", "\\\\x1b"):
        assert escaped in heading
    for fmt in ("markdown", "table"):
        assert all(line.isprintable() for line in run("estimate", str(path), "--format", fmt).out.splitlines())
    # A backslash before a pipe must not free the pipe: it stays one cell.
    assert markdown.table(("a",), [("x\\|y\nz",)]).splitlines()[2] == "| x\\\\\\|y z |"
