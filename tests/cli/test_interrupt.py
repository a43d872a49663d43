"""Ctrl-C and failing traces: an exit code, one line, no half-written file; and a bar for whoever waits at a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftplan.cli import main
from peftplan.errors import InputError
from peftplan.report import progress
from tests.cli.test_exit import ENVIRONMENT, in_terminal

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

# The real command; in its first backward it says so and waits for the signal that Ctrl-C sends. What a shell started in the
# background, such as a suite, ignores that signal, and so would the command.
WAITS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from peftplan.trace.events.tracker import Tracker
begin = Tracker.begin
def stopped(self, phase):
    begin(self, phase)
    if phase == "backward":
        print("now", file=sys.stderr, flush=True)
        time.sleep(60)
Tracker.begin = stopped
"""
MAIN = "\nfrom peftplan.cli import main\nimport sys\nmain(sys.argv[1:])"
JOB = ("estimate", "gpt2", "--method", "lora", "--engine", "trace", "--seq-len", "32")


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    command = (sys.executable, "-c", WAITS + MAIN, *JOB, "--timeline", str(tmp_path / "log.json"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "now\n", "a pipe sees no bar"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.strip() == "peftplan: interrupted in backward of the trace, after base_model.model"
    assert list(tmp_path.iterdir()) == []


def test_a_failing_trace_says_what_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    def forward(self: Any, hidden_states: Any) -> Any:
        return hidden_states @ torch.zeros(3, 3)

    monkeypatch.setattr("transformers.models.gpt2.modeling_gpt2.GPT2MLP.forward", forward)
    with pytest.raises(SystemExit) as done:
        main([*JOB, "--timeline", str(tmp_path / "log.png")])
    out, err = capsys.readouterr()
    assert (done.value.code, out) == (2, "")
    assert err.startswith("peftplan: trace: forward fails in transformer.h.0.mlp")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_gets_no_bar() -> None:
    with progress.waiting("tracing") as told:
        assert told is None, "this stderr is no terminal"


def test_a_terminal_sees_a_bar_that_goes_away() -> None:
    shown = in_terminal(*JOB, columns=100)
    before, _, after = shown.rpartition("tracing ")
    assert "%" in after or "%" in before
    assert "importing torch and transformers" in before + after
    assert after.rindex("\x1b[2K") < after.rindex("gpt2 · lora"), "the line is wiped before the result is shown"


def test_nothing_is_left_of_a_file_that_fails(tmp_path: Path) -> None:
    from peftplan.files import replacing

    target = tmp_path / "kept"
    target.write_bytes(b"old")

    def half_written() -> None:
        with replacing(target, field="file") as file:
            file.write(b"half")
            file.flush()
            assert target.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_written()
    assert target.read_bytes() == b"old"
    with replacing(target, field="file") as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask(), "as any file, not as a temporary one"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_file_takes_no_place_of_a_pipe_or_a_device(tmp_path: Path) -> None:
    from peftplan.files import replacing

    pipe = tmp_path / "rows.parquet"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="it is a pipe or a device"), replacing(pipe, field="--output") as file:
        file.write(b"new")
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
