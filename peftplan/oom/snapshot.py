"""What was alive in a memory snapshot, by the line of the program that allocated it, and the request that failed."""

from __future__ import annotations

from typing import NamedTuple

from peftplan.allocator import snapshots
from peftplan.allocator.snapshots import Entry, load_snapshot, trace_of
from peftplan.oom.kept import LIBRARIES, Earlier, earlier, python_frames
from peftplan.oom.message import Frame, Message

MOST_SHOWN = 12
"""Lines of a program that are named, largest first."""


class Alive(NamedTuple):
    """Blocks that one line of a program allocated and that were alive at the end of the recording."""

    bytes: int
    blocks: int
    file: str
    line: int
    function: str


class Contents(NamedTuple):
    """The failed request of a snapshot, None where it records none; what was alive; and what earlier steps say."""

    message: Message | None
    alive: tuple[Alive, ...]
    earlier: Earlier


def alive_in(path: str, *, device: int = 0) -> Contents:
    """What a snapshot says, by the innermost line of the program. Blocks without frames are counted as one.

    Raises InputError for what is no snapshot.
    """
    snapshot = load_snapshot(path)
    trace = trace_of(snapshot, path, device=device)
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
    entries = snapshot["device_traces"][device]
    failed = [entry for entry in entries if entry["action"] == "oom"]
    lines = sorted((Alive(size, count, *key) for key, (size, count) in groups.items()), reverse=True)[:MOST_SHOWN]
    if not failed:
        return Contents(None, tuple(lines), Earlier())
    free = failed[-1].get("device_free")
    message = Message(
        requested=failed[-1]["size"],
        device=device,
        allocated=allocated,
        reserved=trace.reserved,
        free=free if type(free) is int else None,
        frames=_frames(failed[-1]) or tuple(Frame(alive.file, alive.line, alive.function) for alive in lines[:1]),
    )
    return Contents(message, tuple(lines), earlier(entries, failed[-1], trace.reserved))


def _frames(entry: Entry) -> tuple[Frame, ...]:
    """The Python frames of a request, the innermost last, as in a traceback."""
    return tuple(Frame(*_named(frame)) for frame in reversed(python_frames(entry)))


def _line(block: Entry) -> tuple[str, int, str]:
    python = python_frames(block)
    own = [frame for frame in python if not any(part in frame["filename"] for part in LIBRARIES)]
    frame = next(iter(own or python), None)
    return ("", 0, "unknown") if frame is None else _named(frame)


def _named(frame: snapshots.Frame) -> tuple[str, int, str]:
    return str(frame["filename"])[:500], int(frame.get("line", 0)), str(frame.get("name", ""))[:200]
