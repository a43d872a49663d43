"""The stand-in for `cudaMalloc` and `cuMemCreate`: a capacity, addresses, and a record of every segment taken or returned.

Addresses are this model's own, on multiples of 2 MiB, and never reused. They only decide between free blocks of exactly the same
size in different segments. The one whose segment was made first goes first, wherever it lies: every range lies above the one
before. Before `versions.TIES_BY_AGE` the lowest address went first: there ranges of more than 20 MiB lie each below the one
before, as Linux maps them, and smaller ones, which the driver takes out of larger ranges, each above. That is inferred, since no
source of the driver is public: so ordered, reserved bytes equal what six of ten unquantized runs on a T4 measured, to the MiB,
and the rest within 0.5 %; upwards, eager runs are 9 % off. Ten runs of another program on an RTX 4080 agree: 0.06 % in the
median, -2.9 % at worst; upwards -18 % (docs/trace-drift.md).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from peftplan.allocator.config import LARGE_SEGMENT_SIZE, ROUND_LARGE
from peftplan.allocator.stats import Stats
from peftplan.units import ceil_div

ENDLESS = 2**46
"""Addresses that an expandable segment reserves where the device's memory is unknown: 64 TiB, more than any device holds."""

TOP = 2**60
"""Where downward addresses begin."""

SegmentAction = Literal["segment_alloc", "segment_free", "segment_map", "segment_unmap"]


class SegmentEvent(NamedTuple):
    """Memory taken from or given back to the device while the event with this index ran; actions as in torch's traces."""

    event: int
    action: SegmentAction
    nbytes: int


class Device:
    """Memory that this process may take: `capacity` by what is physically there, `allowed` by a set fraction; None: no limit."""

    def __init__(
        self, stats: Stats, *, capacity: int | None, allowed: int | None, device_bytes: int | None, downwards: bool
    ) -> None:
        self.stats, self.capacity, self.allowed = stats, capacity, allowed
        self.address_space = ENDLESS if device_bytes is None else device_bytes + device_bytes // 8
        """Addresses that an expandable segment reserves: 1 1/8 of the device's memory (`address_space_size`)."""
        self.history: list[SegmentEvent] = []
        self._downwards = downwards
        self._above, self._below = ROUND_LARGE, TOP

    def permits(self, nbytes: int) -> bool:
        """Whether the set fraction leaves room (`allowed_memory_maximum`); asked before the device is."""
        return self.allowed is None or self.stats.reserved + nbytes <= self.allowed

    def has(self, nbytes: int) -> bool:
        """Whether the device can give so much more."""
        return self.capacity is None or self.stats.reserved + nbytes <= self.capacity

    def missing(self, nbytes: int) -> int:
        """By how much `nbytes` more exceed the tighter of the two limits; 0 if they do not."""
        limits = [limit for limit in (self.capacity, self.allowed) if limit is not None]
        return max(0, self.stats.reserved + nbytes - min(limits)) if limits else 0

    def take(self, action: SegmentAction, nbytes: int) -> None:
        """Count memory taken."""
        self.stats.reserve(nbytes)
        self.history.append(SegmentEvent(self.stats.event, action, nbytes))

    def give_back(self, action: SegmentAction, nbytes: int) -> None:
        """Count memory given back."""
        self.stats.unreserve(nbytes)
        self.history.append(SegmentEvent(self.stats.event, action, nbytes))

    def addresses(self, nbytes: int) -> int:
        """The start of a new range of addresses: above all so far; downwards, below all large ones or above all small ones."""
        size = ceil_div(nbytes, ROUND_LARGE) * ROUND_LARGE
        if self._downwards and size > LARGE_SEGMENT_SIZE:
            self._below -= size
            return self._below
        self._above += size
        return self._above - size
