"""Launchers start the worker of the rank that is wanted, and no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peftplan.rehearse.settings import VARIABLE, Settings

LAUNCHER = """
import os, subprocess, sys
from peftplan.rehearse.inside import workers
from peftplan.rehearse.settings import read
workers.start(read())
code = "import os; print(*(os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')), flush=True)"
children = []
for local in range(4):
    env = {**os.environ, "RANK": str(local), "LOCAL_RANK": str(local), "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}
    children.append(subprocess.Popen([sys.executable, "-c", code], env=env))
assert [child.wait() for child in children] == [0] * 4
subprocess.run([sys.executable, "-c", "print('not a worker')"], env=dict(os.environ), check=True)
"""
SPAWNING = """
from peftplan.rehearse.inside import workers
from peftplan.rehearse.settings import read

workers.start(read())
import torch.multiprocessing as mp

def work(number, text):
    print(number, text, flush=True)

if __name__ == "__main__":
    mp.spawn(work, args=("spawned",), nprocs=4)
"""


def run(program: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv(VARIABLE, Settings(str(tmp_path), 3, rank, 1).to_text())
    path = tmp_path / "program.py"
    path.write_text(program, encoding="utf-8")
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", root)
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(("rank", "told"), [(0, "0 0 8"), (6, "6 2 8")])
def test_children_that_are_given_a_rank(rank: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(LAUNCHER, rank, tmp_path, monkeypatch) == [told, "not a worker"]


def test_processes_that_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    assert run(SPAWNING, 2, tmp_path, monkeypatch) == ["2 spawned"]
