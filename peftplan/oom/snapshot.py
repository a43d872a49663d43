"""What a memory snapshot says was alive, by the line of the program that made it, and the request that failed."""

from __future__ import annotations

from typing import Any, NamedTuple

from peftplan.allocator.snapshots import read_trace
from peftplan.oom.message import Frame, Message

MOST_SHOWN = 12
"""Lines of a program that are named, largest first."""
LIBRARIES = ("site-packages", "dist-packages", "/lib/python", "\\lib\\")
"""Parts of paths that are not the user's program."""


class Alive(NamedTuple):
    """Blocks that one line of a program made and that were alive at the end of the recording."""

    bytes: int
    blocks: int
    file: str
    line: int
    function: str


def alive_in(path: str, *, device: int = 0) -> tuple[Message | None, tuple[Alive, ...]]:
    """The failed request of a snapshot, None where it records none, and what was alive, by the innermost line of the program.

    Blocks without frames (a recording without a stack) are counted as one. Raises InputError for what is no snapshot.
    """
    trace = read_trace(path, device=device)
    groups: dict[tuple[str, int, str], tuple[int, int]] = {}
    allocated = 0
    for segment in trace.segments:
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                continue
            size = block["size"]
            allocated += size
            key = _line(block)
            nbytes, count = groups.get(key, (0, 0))
            groups[key] = (nbytes + size, count + 1)
    failed = [event for event in trace.events if event.op == "oom"]
    lines = sorted((Alive(size, count, *key) for key, (size, count) in groups.items()), reverse=True)[:MOST_SHOWN]
    if not failed:
        return None, tuple(lines)
    frames = tuple(Frame(alive.file, alive.line, alive.function) for alive in lines[:1])
    return Message(
        requested=failed[-1].nbytes, device=device, allocated=allocated, reserved=trace.reserved, frames=frames
    ), tuple(lines)


def _line(block: dict[str, Any]) -> tuple[str, int, str]:
    frames = block.get("frames") or ()
    python = [frame for frame in frames if isinstance(frame, dict) and str(frame.get("filename", ""))[-3:] == ".py"]
    own = [frame for frame in python if not any(part in frame["filename"] for part in LIBRARIES)]
    frame = next(iter(own or python), None)
    if frame is None:
        return "", 0, "unknown"
    return str(frame["filename"])[:500], int(frame.get("line", 0)), str(frame.get("name", ""))[:200]
