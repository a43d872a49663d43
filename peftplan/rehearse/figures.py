"""Peaks by phase and step, and the log that still tells them once the process that wrote it is gone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PHASES = ("load", "forward", "backward", "step")
LOG = "log.{process}.jsonl"
"""Name of the log of a process, in the folder of a run."""


class Figure(NamedTuple):
    """What a phase of a step held at most on a device, in bytes."""

    step: int
    phase: str
    device: int
    allocated: int
    reserved: int


def peaks(figures: Iterable[Figure]) -> dict[str, Any]:
    """The figures of one device as a report states them: the first step counts apart from the others where there are more."""
    rows = list(figures)
    last = max(row.step for row in rows)
    steady = [row for row in rows if row.phase == "load" or row.step >= min(2, last)]
    return {
        "peak_allocated": max(row.allocated for row in rows),
        "peak_reserved": max(row.reserved for row in rows),
        "peak_by_phase": _by_phase(steady),
        "reserved_by_phase": _by_phase(steady, reserved=True),
        "steps": [
            {"step": step, "peak_by_phase": _by_phase(row for row in rows if row.step == step)} for step in range(1, last + 1)
        ],
    }


def _by_phase(rows: Iterable[Figure], *, reserved: bool = False) -> dict[str, int]:
    """Phase → the highest allocated, or reserved, bytes of its rows; a phase without rows is left out."""
    most: dict[str, int] = {}
    for row in rows:
        most[row.phase] = max(most.get(row.phase, 0), row.reserved if reserved else row.allocated)
    return {phase: most[phase] for phase in PHASES if phase in most}


def loading(figures: Iterable[Figure]) -> list[Figure]:
    """Figures of what ran before there was an optimizer: all of it was loading."""
    return [figure._replace(step=0, phase="load") for figure in figures]


def read_log(path: Path) -> dict[str, Any] | None:
    """The report of a process that could not write one, without what was alive; None where it held nothing.

    Each line of its log holds what changed: figures, of which a phase that still ran may have several, and facts of the process.
    """
    figures: list[Figure] = []
    facts: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            change: Mapping[str, Any] = json.loads(line)
        except ValueError:
            break  # the process ended while it wrote
        figures = loading(figures) if change.get("loading") else figures
        figures += [Figure(*row) for row in change.get("figures", ())]
        facts |= change.get("facts", {})
    devices = sorted({figure.device for figure in figures})
    if not devices:
        return None
    unknown = {"by_category": {}, "cache_released": 0, "largest": []}
    parts = [{"device": n, **peaks(row for row in figures if row.device == n), **unknown} for n in devices]
    return {"program_exit": None, "host": {}, "oom": None, **facts, "devices": parts}
