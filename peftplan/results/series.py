"""Memory over one optimizer step, from any engine: the data that a timeline draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from peftplan.ledger import Category


class Span(NamedTuple):
    """A phase, from one time to another."""

    phase: str
    start: int
    end: int


class Group(NamedTuple):
    """Equal tensors alive at one time: how many, and the bytes of all of them."""

    name: str
    copies: int
    bytes: int


class Series(NamedTuple):
    """Levels in bytes, each from its time until the next one.

    `times` counts allocations and frees (or moments), not seconds; every other sequence has one entry per time. `largest` names
    the largest groups alive at each time, largest first; `reserved` what the allocator holds of the device.
    """

    times: Sequence[int]
    by_category: Mapping[Category, Sequence[int]]
    phases: Sequence[Span]
    reserved: Sequence[int] | None = None
    largest: Sequence[Sequence[Group]] | None = None

    @property
    def total(self) -> list[int]:
        """All categories together at each time."""
        return [sum(levels) for levels in zip(*self.by_category.values(), strict=True)]

    def phase_at(self, time: int) -> str:
        """The phase that a time belongs to; where two meet, the later one."""
        return next((span.phase for span in reversed(self.phases) if span.start <= time), "")


class Recording(Protocol):
    """A full record of a run, kept by an engine on request."""

    def series(self) -> Series:
        """The steady step, thinned to what can be drawn."""

    def save(self, path: str, *, title: str) -> None:
        """Write every event to a file that can be replayed."""


def extremes(levels: Sequence[int], *, most: int) -> list[int]:
    """Indices of the highest and the lowest level of each of at most `most` // 2 equal stretches, and both ends; all if few."""
    if len(levels) <= most:
        return list(range(len(levels)))
    stretch = -(-len(levels) // (most // 2))
    turning = {0, len(levels) - 1}
    for start in range(0, len(levels), stretch):
        indices = range(start, min(start + stretch, len(levels)))
        turning |= {max(indices, key=levels.__getitem__), min(indices, key=levels.__getitem__)}
    return sorted(turning)
