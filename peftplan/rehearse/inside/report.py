"""The report of one process, as JSON for the one that started it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peftplan.rehearse.figures import Figure, peaks
from peftplan.rehearse.inside import alive, host, ranks, recording
from peftplan.rehearse.settings import Settings

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "deepspeed", "triton")


class Watched(NamedTuple):
    """What was watched in a process.

    `marks`: when each phase began, (µs, step, phase).
    """

    settings: Settings
    figures: list[Figure]
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
        **facts(watched.settings, watched.steps_done),
        "program_exit": watched.program_exit,
        "host": host.host_bytes(),
        "devices": [_device(watched, device) for device in sorted({figure.device for figure in watched.figures})],
        "oom": watched.out_of_memory[-1] if watched.out_of_memory else None,
    }
    for device in {figure.device for figure in watched.figures} if watched.settings.record else ():
        recording.write(folder / f"recorded{device}.{os.getpid()}.json", device, watched.persistent, watched.marks)
    path = folder / f"rank{watched.settings.rank}.{os.getpid()}.json"
    path.with_suffix(".tmp").write_text(json.dumps(report), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def facts(settings: Settings, steps_taken: int) -> dict[str, Any]:
    """What is known of this process at any time."""
    return {
        "rank": settings.rank,
        "world_size": max([settings.world_size, *ranks.groups]),  # a library may be the launcher, as Lightning is
        "process_group": bool(ranks.groups),
        "process": os.getpid(),
        "steps_taken": steps_taken,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Versions of the libraries that the program imported."""
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in PACKAGES}
    return {name: str(version) for name, version in versions.items() if version is not None}


def _device(watched: Watched, device: int) -> dict[str, Any]:
    stats = torch.cuda.memory_stats(device)
    moment, blocks = alive.at_peak(device)
    watched.persistent.find_workspaces(device)
    categorised = list(alive.categories(blocks, watched.persistent, watched.marks, moment))
    sums: dict[str, int] = {}
    for block, category in categorised:
        sums[category] = sums.get(category, 0) + block.bytes
    return {
        "device": device,
        **peaks(figure for figure in watched.figures if figure.device == device),
        "by_category": sums,
        "cache_released": stats.get("num_alloc_retries", 0),
        "largest": alive.by_line(categorised),
    }
