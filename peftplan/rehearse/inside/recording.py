"""Every allocation and free of a device, with its phase, its category and the line that made it, as JSON for a timeline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peftplan.rehearse.inside import alive
from peftplan.rehearse.inside.alive import Block, Persistent

RELEASING = ("segment_free", "segment_unmap")
TAKING = ("segment_alloc", "segment_map")


def write(path: Path, device: int, persistent: Persistent, marks: list[tuple[int, int, str]]) -> None:
    """A row per event, (kind, id, bytes, stream, phase, category, name), and the reserved bytes after it."""
    rows, reserved = [], []
    for row, level in _rows(torch.cuda.memory._snapshot(device)["device_traces"][device], persistent, marks):
        rows.append(row)
        reserved.append(level)
    path.write_text(json.dumps({"device": device, "events": rows, "reserved": reserved}), encoding="utf-8")


def _rows(
    events: list[dict[str, Any]], persistent: Persistent, marks: list[tuple[int, int, str]]
) -> Iterator[tuple[tuple[Any, ...], int]]:
    """What is released counts as one emptying of the cache: torch does not record why."""
    ids: dict[int, int] = {}
    level, releasing = 0, False
    for number, event in enumerate(events):
        action, phase = event["action"], alive.phase_at(marks, event["time_us"])
        level += event["size"] if action in TAKING else -event["size"] if action in RELEASING else 0
        if action in RELEASING and not releasing:
            yield ("empty_cache", 0, 0, 0, phase, "", ""), level
        releasing = action in RELEASING
        if action == "alloc":
            ids[event["addr"]] = number
            block = Block(event["addr"], event["size"], event["time_us"], tuple(event.get("frames", ())))
            category = alive.category(block, persistent, marks)
            yield ("alloc", number, event["size"], event["stream"], phase, category, _name(block)), level
        elif action == "free_completed" and event["addr"] in ids:
            yield ("free", ids.pop(event["addr"]), 0, 0, phase, "", ""), level


def _name(block: Block) -> str:
    file, line, function = alive.line_of(block.frames)
    return f"{file}:{line} in {function}" if file else "autograd"
