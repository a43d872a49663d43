"""A suite: many configurations, one process each, resumed where it stopped.

A suite file is JSON Lines: each line is an object with `model` and options of `peftplan.estimate`. A run that the output already
has, with any outcome, is not repeated. Runs are compared by their setup, not by their line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import IO, Any

from peftplan import files
from peftplan.accuracy.jsonl import RecordFileError, append, read, repair
from peftplan.accuracy.records import Record, Run
from peftplan.errors import InputError, PeftplanError
from peftplan.job.prepare import prepare
from peftplan.measure.identity import STEPS, WARMUP, key, lost, run_of

CHILD: tuple[str, ...] = (sys.executable, "-m", "peftplan.measure.child")
"""The command that runs one configuration."""

TIMEOUT = 600.0
"""Seconds after which a run counts as hung. An 8B model is built, quantized and stepped well within that time."""


@dataclass(frozen=True)
class Entry:
    """One line of a suite."""

    line: int
    model: str
    options: dict[str, Any]
    run: Run

    @property
    def key(self) -> str:
        """The key that identifies it among other lines and records."""
        return key(self.run)


@dataclass(frozen=True)
class Done:
    """One finished run of a suite: its number, the number of runs, its duration, and its record."""

    number: int
    of: int
    seconds: float
    record: Record


def read_suite(path: Path) -> list[Entry]:
    """Every configuration of a suite file. Each is prepared here, so that none is refused halfway through the suite.

    Raises RecordFileError with the line that is not a configuration, that cannot be estimated, or that repeats another.
    """
    text = files.text(path, field="suite")
    entries: list[Entry] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        entry = _entry(path, number, line)
        first = lines.setdefault(entry.key, number)
        if first != number:
            raise RecordFileError(path, number, f"the same configuration as line {first}")
        entries.append(entry)
    if not entries:
        raise InputError("suite", str(path), "accepted: JSON Lines, each an object with model and options of `peftplan estimate`")
    return entries


def _entry(path: Path, number: int, line: str) -> Entry:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordFileError(path, number, f"not JSON ({error})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), str):
        raise RecordFileError(path, number, "accepted: a JSON object with a model")
    options = {name: value for name, value in raw.items() if name != "model"}
    suite_option = next((name for name in ("output", "warmup", "steps", "snapshot") if name in options), None)
    if suite_option is not None:
        raise RecordFileError(path, number, f"{suite_option} is set for the whole suite, not for one run")
    try:
        job = prepare(raw["model"], **options)
    except PeftplanError as error:
        raise RecordFileError(path, number, str(error)) from None
    return Entry(number, raw["model"], options, run_of(job))


def recorded(output: Path) -> list[Record]:
    """The records of an output file; none if it does not exist. Its last line may be incomplete after a crash."""
    if not os.path.exists(output):
        return []
    repair(output)
    return read(output)


def pending(entries: Sequence[Entry], output: Path) -> list[Entry]:
    """The entries that the output does not have yet."""
    recorded_keys = {key(record.run) for record in recorded(output)}
    return [entry for entry in entries if entry.key not in recorded_keys]


def run_suite(
    entries: Sequence[Entry],
    *,
    output: Path,
    warmup: int = WARMUP,
    steps: int = STEPS,
    timeout: float = TIMEOUT,
    starting: Callable[[int, int, Entry], None] = lambda number, of, entry: None,
) -> Iterator[Done]:
    """Run the pending entries, one process after the other, and yield each run once its record is in `output`.

    A process that leaves no record gets one that says why. Raises NoCudaError without a GPU.
    """
    from peftplan.measure import cuda  # imports torch, which reading a suite does not need

    card = cuda.card_name()
    todo = pending(entries, output)
    before = len(entries) - len(todo)
    for number, entry in enumerate(todo, start=before + 1):
        starting(number, len(entries), entry)
        started = monotonic()
        error = _in_own_process(entry, output=output, warmup=warmup, steps=steps, timeout=timeout)
        record = next((r for r in reversed(recorded(output)) if key(r.run) == entry.key), None)
        if record is None:
            record = lost(entry.run, gpu=card, error=error or "the process ended without a record")
            append(output, [record])
        yield Done(number, len(entries), monotonic() - started, record)


def _in_own_process(entry: Entry, *, output: Path, warmup: int, steps: int, timeout: float) -> str | None:
    """Run one entry in its own process. Returns what went wrong with the process, or None."""
    order = {"model": entry.model, "options": entry.options, "output": str(output), "warmup": warmup, "steps": steps}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(CHILD, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            return _waited(process, json.dumps(order) + "\n", log, timeout)
        finally:
            process.kill()
            process.wait()


def _waited(process: subprocess.Popen[bytes], order: str, log: IO[bytes], timeout: float) -> str | None:
    stdin = process.stdin
    assert stdin is not None
    try:
        stdin.write(order.encode())
        stdin.flush()
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"still running after {timeout:g} s"
    except BrokenPipeError:
        code = process.wait()
    if code == 0:
        return None
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{ended}: {lines[-1][:300]}" if lines else ended
