"""The keeper ends as the program ended, leaves nothing behind that it started, and bounds what it takes of the host."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftplan.rehearse import keeper

KEEP = """
import sys
from pathlib import Path
from peftplan.rehearse import keeper
keeper.GRACE = 1.0
keeper.keep(sys.argv[3:], Path(sys.argv[1]), limit=int(sys.argv[2]), written=lambda: 0)
"""
RUNAWAY = """
import subprocess, sys
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
away = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
open(sys.argv[1], "w").write(str(away.pid))
"""


def kept(folder: Path, *command: str, limit: int = 2**40) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", KEEP, str(folder), str(limit), *command], start_new_session=True)


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def written(path: Path) -> int:
    for _ in range(500):
        if path.exists() and (text := path.read_text(encoding="ascii")):
            return int(text)
        time.sleep(0.02)
    raise AssertionError(f"{path} was not written")


@pytest.mark.parametrize(
    ("command", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -SEGV $$", -signal.SIGSEGV), ("kill -9 $$", -9)]
)
def test_it_ends_as_the_program_ended(command: str, code: int, tmp_path: Path) -> None:
    assert kept(tmp_path, "sh", "-c", command).wait() == code


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    assert kept(tmp_path, "no-such-program").wait() == keeper.NOT_THERE
    assert (tmp_path / keeper.NOT_STARTED).read_text(encoding="utf-8") == os.strerror(errno.ENOENT)


def test_a_process_in_its_own_session_does_not_get_away(tmp_path: Path) -> None:
    assert kept(tmp_path, sys.executable, "-c", RUNAWAY, str(tmp_path / "pid")).wait() == 0
    assert gone(written(tmp_path / "pid"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_all_end_when_it_is_told_to_or_its_parent_dies(number: signal.Signals, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys; p = subprocess.Popen(sys.argv[2:]); open(sys.argv[1], 'w').write(str(p.pid)); p.wait()",
            *(str(tmp_path / "keeper"), sys.executable, "-c", KEEP, str(tmp_path), str(2**40)),
            *(sys.executable, "-c", f"{RUNAWAY}\naway.wait()", str(tmp_path / "pid")),
        ]
    )
    pids = [written(tmp_path / name) for name in ("keeper", "pid")]
    os.kill(parent.pid if number == signal.SIGKILL else pids[0], number)
    parent.wait()
    assert all(gone(pid) for pid in pids)


def test_a_program_that_takes_too_much_of_the_host_is_stopped(tmp_path: Path) -> None:
    process = kept(tmp_path, sys.executable, "-c", "import time; x = b'x' * (200 << 20); time.sleep(60)", limit=100 << 20)
    assert process.wait() == -signal.SIGTERM
    seen = keeper.read(tmp_path)
    assert seen.over
    assert 100 << 20 < seen.host_bytes < 300 << 20
    assert json.loads((tmp_path / keeper.REPORT).read_text(encoding="ascii"))["over"] is True


FORKED = "import os, time; x = b'x' * (100 << 20); os.fork(); time.sleep(1.5)"


def test_a_page_that_forked_processes_share_counts_once(tmp_path: Path) -> None:
    """Two processes hold the same 100 MiB; each holds 110 MiB by itself."""
    assert kept(tmp_path, sys.executable, "-c", FORKED, limit=190 << 20).wait() == 0
    seen = keeper.read(tmp_path)
    assert not seen.over
    assert 100 << 20 < seen.host_bytes < 150 << 20


def test_only_processes_that_may_share_pages_are_looked_at_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(keeper, "_bytes", lambda pid, file, name: read.append(file) or 10)
    assert keeper._host_bytes([1], 0) == 10
    assert keeper._host_bytes([1, 2], 20) == 20
    assert "smaps_rollup" not in read
    assert keeper._host_bytes([1, 2], 19) == 20
    assert read[-2:] == ["smaps_rollup"] * 2
