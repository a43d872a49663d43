"""Stays beside a program until all that it started is gone, and bounds the host memory of all of it.

Linux hands the orphans of a program to the nearest ancestor that asks for them (`PR_SET_CHILD_SUBREAPER`), so that no process
gets away, not even one in a session of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
NOT_THERE = 127
"""A shell's exit code for a command that is not there."""
GRACE = 5.0
"""Seconds that processes have to end once they were told to."""
PERIOD = 0.5
"""Seconds between two looks at the host's memory."""
REPORT, NOT_STARTED = "keeper.json", "not-started.txt"
HEARD = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


class Kept(NamedTuple):
    """What a keeper saw: the most bytes of host memory, and whether that was more than it was allowed to be."""

    host_bytes: int
    over: bool


def keep(command: list[str], folder: Path, *, limit: int, written: Callable[[], int]) -> NoReturn:
    """Run `command`, then end as it ended. `limit`: bytes of host memory; `written`: bytes of it that files take.

    SIGTERM and SIGINT are passed on to all processes, SIGHUP comes when the one that started this ends; `GRACE` later what is
    left is killed.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
        _become(command, folder)
    status, seen = _attend(child, limit, written)
    _end(signal.SIGTERM)
    (folder / REPORT).write_text(json.dumps(seen._asdict()), encoding="ascii")
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        _die_by(-code)
    os._exit(code)


def read(folder: Path) -> Kept:
    """What the keeper of a run saw."""
    path = folder / REPORT
    return Kept(**json.loads(path.read_text(encoding="ascii"))) if path.exists() else Kept(0, over=False)


def _become(command: list[str], folder: Path) -> NoReturn:
    try:
        os.execvp(command[0], command)
    except OSError as error:
        (folder / NOT_STARTED).write_text(str(error.strerror), encoding="utf-8")
        os._exit(NOT_THERE)


def _attend(child: int, limit: int, written: Callable[[], int]) -> tuple[int, Kept]:
    """Wait for the child; its status, and what was seen."""
    seen, next_look = Kept(0, over=False), 0.0
    while True:
        heard = signal.sigtimedwait(HEARD, PERIOD)
        for pid, status in _ended():
            if pid == child:
                return status, seen
        if heard is not None and heard.si_signo != signal.SIGCHLD:
            _end(signal.SIGINT if heard.si_signo == signal.SIGINT else signal.SIGTERM, sparing=child)
        if time.monotonic() >= next_look:
            now = written() + _host_bytes(_descendants(), seen.host_bytes)
            seen = Kept(max(seen.host_bytes, now), over=seen.over or now > limit)
            if now > limit:
                _end(signal.SIGTERM, sparing=child)
            next_look = time.monotonic() + PERIOD


def _ended() -> Iterator[tuple[int, int]]:
    """Processes that ended, with their status."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended


def _end(kind: signal.Signals, *, sparing: int | None = None) -> None:
    """Tell every process to end, and kill what is left later. The status of `sparing` is left for its reader."""
    for told in (kind, signal.SIGKILL):
        for pid in _descendants():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, told)
        until = time.monotonic() + GRACE
        while time.monotonic() < until and _running(sparing):
            time.sleep(0.02)


def _running(sparing: int | None) -> bool:
    """Whether there are processes that have not ended. Those that have are cleared away, but for `sparing`."""
    running = False
    for pid in _descendants():
        if _stat(pid)[0] != "Z":
            running = True
        elif pid != sparing:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    return running


def _stat(pid: int) -> tuple[str, int]:
    """A process' state and its parent; ("Z", 0) where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "Z", 0
    return fields[0], int(fields[1])


def _descendants() -> list[int]:
    """Every process below this one."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            children.setdefault(_stat(int(name))[1], []).append(int(name))
    below = list(children.get(os.getpid(), ()))
    for pid in below:
        below += children.get(pid, ())
    return below


def _host_bytes(pids: list[int], most: int) -> int:
    """Bytes of host memory of processes, files left out.

    Pages that forked processes share are shared out only where they may make more than `most`: the kernel goes through every page
    to tell them, which takes 20 ms for a program that has imported torch and TRL.
    """
    resident = sum(_bytes(pid, "status", "RssAnon") for pid in pids)
    if len(pids) < 2 or resident <= most:
        return resident
    return sum(_bytes(pid, "smaps_rollup", "Pss_Anon") for pid in pids)


def _bytes(pid: int, file: str, name: str) -> int:
    """What the kernel says of a process under this name, 0 where the process or the name is gone."""
    try:
        text = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return 1024 * int(text.partition(f"\n{name}:")[2].partition("kB")[0] or 0)


def _die_by(number: int) -> None:
    """End by the same signal, without a core file."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # SIGKILL has no handler
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
