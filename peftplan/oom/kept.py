"""What a recording shows of earlier steps: blocks that they gave back and the last did not, and a batch longer than theirs.

A recording is cut into passes: one ends where allocated bytes fall by `FALL` of what they had climbed. Blocks are alike where
they have one size and one line of a library made them (or of the program, where it calls none). If a pass ended with n of them
alive, those above n are *kept*. So are blocks of `PASSES` passes and more that no pass freed.

    allocated   /|  /|  /|   /        three steps, then a loop that frees nothing
               / | / | / |  /
              /  |/  |/  |_/          blocks alike: 8, 8, 8 at the tops, 600 at the end: 592 are kept
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from peftplan.allocator.snapshots import Entry, Frame

FALL, PASSES = 0.3, 4
"""Choices, not measurements: a step frees its activations, most of what it climbed; a few blocks may last by chance."""
SHARE = 0.25
"""Of what torch reserves: what is kept below this share is no cause."""
LIBRARIES = ("site-packages", "dist-packages", "/lib/python", "\\lib\\")
"""Parts of paths that are not the user's program."""

Alike = tuple[int, str, int]
"""The size of a block, and the file and line that made it."""


class Kept(NamedTuple):
    """Bytes and blocks that earlier passes would have given back."""

    bytes: int
    blocks: int
    passes: int
    """Passes that the recording shows before the last."""


class Earlier(NamedTuple):
    """What earlier passes say of the last one. `kept` is None where it is less than `SHARE` of the reserved bytes.

    `most_at_once`: the largest request of the line whose request failed, None where no earlier pass has one.
    """

    kept: Kept | None = None
    most_at_once: int | None = None


def earlier(entries: Sequence[Entry], failed: Entry, reserved: int) -> Earlier:
    """What the entries of a device's trace show of the steps before `failed`."""
    passes = _Passes()
    for entry in entries:
        passes.add(entry)
    _, *place = _alike(failed)
    at_once = [size for size, *where in passes.at_tops if where == place]
    return Earlier(_kept(passes, reserved), max(at_once, default=None))


def _kept(passes: _Passes, reserved: int) -> Kept | None:
    counts: Counter[Alike] = Counter()
    for alike, count in passes.alive.items():
        made_in = passes.made_in[alike]
        if passes.at_tops[alike] and count > passes.at_tops[alike]:
            counts[alike] = count - passes.at_tops[alike]
        if sum(number > 0 for number in made_in.values()) >= PASSES:
            counts[alike] = max(counts[alike], count - max(made_in.values()))
    total = sum(alike[0] * count for alike, count in counts.items())
    return Kept(total, sum(counts.values()), passes.number) if total >= SHARE * reserved else None


class _Passes:
    """Blocks alive by what they are alike in, and how many were at the top of each pass."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[Alike, int]] = {}
        self.alive: Counter[Alike] = Counter()
        self.made_in: dict[Alike, Counter[int]] = defaultdict(Counter)
        self.at_tops: Counter[Alike] = Counter()
        self.number = 0
        self._most: Counter[Alike] = Counter()
        self._allocated = self._top = self._low = 0
        self._falling = False

    def add(self, entry: Entry) -> None:
        if entry["action"] == "alloc":
            alike = _alike(entry)
            self.blocks[entry["addr"]] = alike, self.number
            self.alive[alike] += 1
            self.made_in[alike][self.number] += 1
            self._most[alike] = max(self._most[alike], self.alive[alike])
            self._allocated += entry["size"]
        elif entry["action"] == "free_completed" and entry["addr"] in self.blocks:
            alike, number = self.blocks.pop(entry["addr"])
            self.alive[alike] -= 1
            self.made_in[alike][number] -= 1
            self._allocated -= entry["size"]
        else:
            return
        self._turn()

    def _turn(self) -> None:
        """End a pass where bytes have fallen, begin one where they climb again."""
        if self._falling:
            self._low = min(self._low, self._allocated)
            if self._allocated > self._low + FALL * (self._top - self._low):
                self._falling, self._top = False, self._allocated
                self._most = Counter(self.alive)
            return
        self._top = max(self._top, self._allocated)
        if self._allocated < self._top - FALL * (self._top - self._low):
            self._falling, self._low = True, self._allocated
            self.number += 1
            for alike, count in self._most.items():
                self.at_tops[alike] = max(self.at_tops[alike], count)


def python_frames(entry: Entry) -> list[Frame]:
    """The frames of an entry or a block that are Python, the innermost first."""
    frames = entry.get("frames") or ()
    return [frame for frame in frames if isinstance(frame, Mapping) and str(frame.get("filename", ""))[-3:] == ".py"]


def _alike(entry: Entry) -> Alike:
    frame = next(iter(python_frames(entry)), Frame())
    return entry["size"], str(frame.get("filename", "")), int(frame.get("line", 0))
