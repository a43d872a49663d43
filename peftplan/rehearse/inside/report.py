"""The report of one process, as JSON for the one that started it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peftplan.rehearse.inside import alive, host, ranks, recording
from peftplan.rehearse.settings import Settings

PHASES = ("load", "forward", "backward", "step")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "deepspeed", "triton")


class Watched(NamedTuple):
    """What was watched in a process.

    `figures`: a row per phase that ended, (step, phase, device, allocated, reserved). `marks`: when each phase began, (µs, step,
    phase).
    """

    settings: Settings
    figures: list[tuple[int, str, int, int, int]]
    marks: list[tuple[int, int, str]]
    persistent: alive.Persistent
    steps_done: int
    program_exit: str | None
    out_of_memory: list[dict[str, Any]]


def write(watched: Watched) -> None:
    """Write what a process that used a device showed, or asked one for too much; others write nothing."""
    if not (watched.figures or watched.out_of_memory):
        return
    folder = Path(watched.settings.folder)
    if watched.settings.snapshot:
        torch.cuda.memory._dump_snapshot(str(folder / f"rank{watched.settings.rank}.pickle"))  # type: ignore[no-untyped-call]
    report = {
        "rank": watched.settings.rank,
        "world_size": watched.settings.world_size,
        "process_group": bool(ranks.groups),
        "process": os.getpid(),
        "program": sys.argv[:1],
        "steps_taken": watched.steps_done,
        "program_exit": watched.program_exit,
        "host": host.host_bytes(),
        "versions": _versions(),
        "devices": [_device(watched, device) for device in sorted({row[2] for row in watched.figures})],
        "oom": watched.out_of_memory[-1] if watched.out_of_memory else None,
    }
    for device in {row[2] for row in watched.figures} if watched.settings.record else ():
        recording.write(folder / f"recorded{device}.{os.getpid()}.json", device, watched.persistent, watched.marks)
    path = folder / f"rank{watched.settings.rank}.{os.getpid()}.json"
    path.with_suffix(".tmp").write_text(json.dumps(report), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def _versions() -> dict[str, str]:
    """Versions of the libraries that the program imported."""
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in PACKAGES}
    return {name: str(version) for name, version in versions.items() if version is not None}


def _device(watched: Watched, device: int) -> dict[str, Any]:
    rows = [row for row in watched.figures if row[2] == device]
    last = max(row[0] for row in rows)
    steady = [row for row in rows if row[1] == "load" or row[0] >= min(2, last)]
    stats = torch.cuda.memory_stats(device)
    moment, blocks = alive.at_peak(device)
    watched.persistent.find_workspaces(device)
    categorised = list(alive.categories(blocks, watched.persistent, watched.marks, moment))
    sums: dict[str, int] = {}
    for block, category in categorised:
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
        "largest": alive.by_line(categorised),
    }


def _by_phase(rows: Iterable[tuple[int, str, int, int, int]], *, reserved: bool = False) -> dict[str, int]:
    """Phase → the highest allocated, or reserved, bytes of its rows; a phase without rows is left out."""
    peaks: dict[str, int] = {}
    for row in rows:
        peaks[row[1]] = max(peaks.get(row[1], 0), row[4] if reserved else row[3])
    return {phase: peaks[phase] for phase in PHASES if phase in peaks}
