"""`peftplan measure --suite default` on a rehearsed card, against what the trace says of the same runs.

    peftplan rehearse --gpu a100-80gb --steps 0 --keep-writes -- peftplan measure --suite default --output RUNS
    python -m tools.rehearsed_suite RUNS

The first command needs the CUDA build of torch and nvidia-ml-py; it goes on where it was stopped. The second traces each run that
tests/rehearse/suite.json has not, keeps both there, and puts the table between the marks of docs/rehearse.md.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peftplan.accuracy.drift import measured_figures
from peftplan.accuracy.engines import BY_PHASE, Figure, ask
from peftplan.accuracy.jsonl import read
from peftplan.accuracy.records import Record
from peftplan.measure.identity import key
from peftplan.measure.suite import read_suite
from peftplan.rehearse import rehearse
from tools import marked

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "data" / "suites" / "default.jsonl"
ROWS = ROOT / "tests" / "rehearse" / "suite.json"
PAGE = ROOT / "docs" / "rehearse.md"
MARKS = ("<!-- suite -->", "<!-- end of the suite -->")
FIGURES: tuple[Figure, ...] = ("allocated", "reserved", *BY_PHASE)


def measured(line: str) -> Record:
    """The record of one line of the suite, from a rehearsed card."""
    with TemporaryDirectory() as folder:
        suite, output = Path(folder, "suite.jsonl"), Path(folder, "runs.jsonl")
        suite.write_text(f"{line}\n", encoding="utf-8")
        command = [sys.executable, "-m", "peftplan", "measure", "--suite", str(suite), "--output", str(output)]
        rehearse(command, gpu="a100-80gb", steps=0, keep_writes=True, timeout=900, stdout=sys.stderr.fileno())
        return next(iter(read(output)))


def compared(records: Iterable[Record], earlier: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row per run of the suite that was rehearsed, in the suite's order: what it held, and what the trace says."""
    by_key = {key(record.run): record for record in records}
    by_title = {title(row["run"]): row for row in earlier}
    lines = SUITE.read_text(encoding="utf-8").splitlines()
    for entry in read_suite(SUITE):
        run = json.loads(lines[entry.line - 1])
        record = by_key.get(entry.key)
        if title(run) in by_title:
            yield by_title[title(run)]
        elif record is not None:
            rehearsed = {name: bytes_ for name, bytes_ in measured_figures(record) if name in FIGURES}
            traced = {name: bytes_ for name, bytes_ in ask(record, "trace").figures.items() if name in FIGURES}
            versions = dict(record.circumstances.versions)
            yield {"run": run, "outcome": record.outcome, "rehearsed": rehearsed, "traced": traced, "versions": versions}


def drift(row: dict[str, Any], figure: str) -> float | None:
    """Signed per cent of the trace against the rehearsal; None where one has no number."""
    ours, theirs = row["traced"].get(figure), row["rehearsed"].get(figure)
    return 100 * (ours / theirs - 1) if ours and theirs else None


def table(rows: list[dict[str, Any]]) -> str:
    """How far all are apart, then each run."""
    lines = ["| trace against rehearsal | runs | median absolute | lowest | highest |", "| --- | --- | --- | --- | --- |"]
    for figure in FIGURES:
        drifts = [one for row in rows if (one := drift(row, figure)) is not None]
        cells = (f"{statistics.median(map(abs, drifts)):.4f} %", f"{min(drifts):+.4f} %", f"{max(drifts):+.4f} %")
        lines.append(f"| {figure} | {len(drifts)} | {' | '.join(cells)} |")
    lines += ["", "| run | allocated | reserved | trace: allocated / reserved |", "| --- | --- | --- | --- |"]
    for row in rows:
        if row["outcome"] == "oom":
            peaks, apart = "out of memory | –", f"out of memory: {row['traced']['reserved']:,}"
        else:
            apart = " / ".join(f"{drift(row, figure):+.4f} %" for figure in ("allocated", "reserved"))
            peaks = " | ".join(f"{row['rehearsed'][figure]:,}" for figure in ("allocated", "reserved"))
        lines.append(f"| `{title(row['run'])}` | {peaks} | {apart} |")
    return "\n".join(lines)


def title(run: dict[str, Any]) -> str:
    """A line of the suite in the options of `peftplan estimate`."""
    words = [run["model"]]
    for name, value in run.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            off = f"drop-{option.removeprefix('keep-')}" if option.startswith("keep-") else f"no-{option}"
            words.append(f"--{option if value else off}")
        elif name != "model":
            words.append(f"--{option} {','.join(value) if isinstance(value, list) else value}")
    return " ".join(words)


def write(rows: list[dict[str, Any]]) -> None:
    """Keep the rows, and put the table into the page."""
    ROWS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    marked.write(PAGE, MARKS, table(rows))


if __name__ == "__main__":
    before = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else []
    write(list(compared(read(Path(sys.argv[1])), before)))
