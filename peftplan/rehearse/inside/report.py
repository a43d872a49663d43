"""The report of one process, as JSON for the one that started it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftplan.rehearse.inside import alive

if TYPE_CHECKING:
    from peftplan.rehearse.inside.watch import Watch

PHASES = ("load", "forward", "backward", "step")


def write(watch: Watch) -> None:
    """Write what a process that used a device showed; others write nothing."""
    if not watch.figures:
        return
    folder = Path(watch.settings.folder)
    if watch.settings.snapshot:
        torch.cuda.memory._dump_snapshot(str(folder / f"rank{watch.settings.rank}.pickle"))  # type: ignore[no-untyped-call]
    report = {
        "rank": watch.settings.rank,
        "process": os.getpid(),
        "program": sys.argv[:1],
        "steps_taken": watch.steps_done,
        "program_exit": watch.program_exit,
        "devices": [_device(watch, device) for device in sorted({row[2] for row in watch.figures})],
        "oom": watch.out_of_memory[-1] if watch.out_of_memory else None,
    }
    path = folder / f"rank{watch.settings.rank}.{os.getpid()}.json"
    path.with_suffix(".tmp").write_text(json.dumps(report), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def _device(watch: Watch, device: int) -> dict[str, Any]:
    rows = [row for row in watch.figures if row[2] == device]
    last = max(row[0] for row in rows)
    steady = [row for row in rows if row[1] == "load" or row[0] >= min(2, last)]
    stats = torch.cuda.memory_stats(device)
    moment, blocks = alive.at_peak(device)
    watch.persistent.find_workspaces(device)
    named = list(alive.categories(blocks, watch.persistent, watch.marks, moment))
    sums: dict[str, int] = {}
    for block, category in named:
        sums[category] = sums.get(category, 0) + block.bytes
    return {
        "device": device,
        "peak_allocated": max(row[3] for row in rows),
        "peak_reserved": max(row[4] for row in rows),
        "peak_by_phase": _by_phase(steady),
        "reserved_by_phase": _by_phase(steady, reserved=True),
        "steps": [
            {"step": step, "peak_by_phase": _by_phase(row for row in rows if row[0] == step)} for step in range(1, last + 1)
        ],
        "by_category": sums,
        "cache_released": stats.get("num_alloc_retries", 0),
        "largest": alive.by_line(named),
    }


def _by_phase(rows: Iterable[tuple[int, str, int, int, int]], *, reserved: bool = False) -> dict[str, int]:
    """Phase → the highest allocated, or reserved, bytes of its rows; a phase without rows is left out."""
    peaks: dict[str, int] = {}
    for row in rows:
        peaks[row[1]] = max(peaks.get(row[1], 0), row[4] if reserved else row[3])
    return {phase: peaks[phase] for phase in PHASES if phase in peaks}
