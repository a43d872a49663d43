"""A thousand random inputs, the same every time: each is answered or refused in one line (`python -m tools.fuzz` runs more)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of a process are those of Linux")
def test_a_thousand_inputs() -> None:
    command = (sys.executable, "-m", "tools.fuzz", "--inputs", "1000", "--seed", "ci")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faults" in done.stdout


def test_what_breaks_the_rule_is_a_fault() -> None:
    pytest.importorskip("resource")
    from tools.fuzz.judge import judged_call, judged_command

    def raising() -> object:
        raise KeyError("a traceback")

    assert judged_call(raising)[0] == "fault"
    assert judged_call(lambda: {"peak": float("inf")})[0] == "fault"
    assert judged_call(lambda: {"peak": 1})[0] == "answer"
    refusals = {
        "peftplan: one line\n": "refusal",
        "": "fault",
        "peftplan: two\nlines\n": "fault",
        "another: one line\n": "fault",
        "peftplan: \x1b[31mred\n": "fault",
        f"peftplan: {'x' * 1000}\n": "fault",
        "peftplan: out of memory\n": "fault",
    }
    assert {text: judged_command(2, "", text)[0] for text in refusals} == refusals
    assert judged_command(2, "half an answer", "peftplan: one line\n")[0] == "fault"
    assert judged_command(130, "", "peftplan: one line\n")[0] == "fault"
    assert judged_command(0, "a table\n", "")[0] == "answer"
    assert judged_command(0, "\x1b[31m\n", "")[0] == "fault"
    assert judged_command(0, "{}", "Traceback (most recent call last)")[0] == "fault"
    assert judged_command(1, '{"a": Infinity}', "", strict=True)[0] == "fault"
    assert judged_command(1, '{"a": 1}', "", strict=True)[0] == "answer"
