"""torch's out-of-memory message and the traceback above it, as facts.

Source: c10/cuda/CUDACachingAllocator.cpp. In old releases the numbers are in parentheses (`GPU 0; 23.69 GiB total capacity; …
already allocated; … free; … reserved in total by PyTorch`). Since 2.1 they stand in sentences, with what the process holds
besides (`Including non-PyTorch memory, this process has …` or `Process 42 has …`, a number as the driver sees it). Figures have
two digits after the point, so sizes are known to half of the last one.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import NamedTuple

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 2**10, "MB": 2**20, "GB": 2**30}
"""torch's own: older versions print GiB, the oldest GB for the same."""
SIZE = r"(\d[\d,]*(?:\.\d+)?) (bytes|[KMGT]i?B)"
FIGURES: dict[str, tuple[str, ...]] = {
    "requested": (rf"[Tt]ried to allocate {SIZE}",),
    "capacity": (rf"total capac(?:i)?ty of {SIZE}", rf"{SIZE} total capacity"),
    "free": (rf"of which {SIZE} is free", rf"{SIZE} free"),
    "allowed": (rf"{SIZE} allowed",),
    "allocated": (rf"{SIZE} is allocated by PyTorch", rf"{SIZE} already allocated"),
    "unallocated": (rf"{SIZE} is reserved by PyTorch but unallocated",),
    "reserved": (rf"{SIZE} reserved in total by PyTorch",),
    "pools": (rf"{SIZE} allocated in private pools",),
    "process": (rf"this process has {SIZE} memory in use",),
}
DEVICE = re.compile(r"GPU (\d+)")
OTHERS = re.compile(rf"Process \d+ has {SIZE} memory in use")
BEGINNING = re.compile(r"(?:CUDA|HIP|XPU)? ?out of memory", re.IGNORECASE)
FRAME = re.compile(r'File "(?P<file>[^"\n]+)", line (?P<line>\d+),? in (?P<function>[^\n]+)\n?(?P<code>[^\n]*)')
RANK = re.compile(r"^\s*\[?(?:default\d+|rank ?\d+)\]?:? ?", re.MULTILINE)
REQUEST = "ried to allocate "
"""What every message says after its beginning; found much faster than that in a long log."""
MOST_READ = 1000
"""Places of a log that are read, if none of them holds a message."""
AROUND = 2000
"""Characters of a log in which one message lies."""
BEFORE = 40_000
"""Characters of a log in which its traceback lies."""


class Frame(NamedTuple):
    """One frame of a traceback; `code` is its line of source where the log has it."""

    file: str
    line: int
    function: str
    code: str = ""


class Message(NamedTuple):
    """What a message says, in bytes; None where it does not. `reserved` is what torch's allocator held, allocated or not."""

    requested: int
    device: int | None = None
    capacity: int | None = None
    free: int | None = None
    allowed: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    pools: int | None = None
    process: int | None = None
    """What this process held on the device, context included; as the driver counts."""
    others: tuple[int, ...] = ()
    """What processes held that the message names by number; of one alone it is not known whether it is this one."""
    frames: tuple[Frame, ...] = ()
    """The traceback before the message, outermost frame first; empty if the log has none."""


def find(text: str) -> Message | None:
    """The first out-of-memory message of a text or a log, with its traceback; None where there is none.

    The first, since what follows it is often its echo, or fails because of it.
    """
    for request in islice(re.finditer(REQUEST, text), MOST_READ):
        for start in BEGINNING.finditer(text, max(request.start() - AROUND, 0), request.start()):
            message = _read(text, start.start())
            if message is not None:
                return message
    return None


def _read(text: str, at: int) -> Message | None:
    sentence = " ".join(text[at : at + AROUND].split())
    again = BEGINNING.search(sentence, 20)
    sentence = sentence[: again.start()] if again else sentence
    figures = {name: _first(patterns, sentence) for name, patterns in FIGURES.items()}
    requested = figures.pop("requested")
    if requested is None:
        return None
    unallocated, allocated = figures.pop("unallocated"), figures["allocated"]
    if unallocated is not None and allocated is not None:
        figures["reserved"] = allocated + unallocated
    device = DEVICE.search(sentence)
    others = tuple(_bytes(*match.groups()) for match in OTHERS.finditer(sentence))
    return Message(
        requested=requested,
        device=int(device[1]) if device else None,
        others=others,
        frames=_frames(text[max(0, at - BEFORE) : at]),
        **figures,
    )


def _first(patterns: tuple[str, ...], text: str) -> int | None:
    for pattern in patterns:
        if match := re.search(pattern, text):
            return _bytes(match[1], match[2])
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number.replace(",", "")) * UNITS[unit])


def _frames(log: str) -> tuple[Frame, ...]:
    """The frames of the last traceback of a log; a rank's prefix before each line does not matter."""
    plain = RANK.sub("", log)
    begins = plain.rfind("Traceback (most recent call last)")
    frames = FRAME.finditer(plain, max(begins, 0))
    return tuple(Frame(f["file"], int(f["line"]), f["function"].strip(), f["code"].strip()) for f in frames)
