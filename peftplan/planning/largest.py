"""The largest size of a job that fits: by bisection, then size by size where reserved bytes may change the answer.

Allocated bytes grow with every size. Reserved bytes do so on the whole, but may drop by some hundred MiB where blocks come to lie
elsewhere. So the largest size is the largest n such that n and every smaller size do, and a larger one may do again. Example, of
batch sizes on a card that takes 23 GiB::

    batch size            5     6     7     8     9
    reserved, GiB      19.8  22.4  23.1  22.9  25.6
    fits                yes   yes    no   yes    no     -> largest 6, again 8
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from peftplan.units import MIB

CAUTION = 2
"""The allowance for sizes that are not evaluated, as a multiple of the largest observed drop of reserved bytes."""

LEAST_DROP = 128 * MIB
"""The allowance if no drop was observed."""

LEAST_ASKED = 32
"""Sizes that are asked one by one at least: within a few, blocks may come to lie elsewhere, which GiBs depend on (qwen1.5-0.5b,
full, sequences of 512 tokens: batch 14 reserves 19.77 GiB, batch 15 16.76 GiB)."""

MOST_ASKED = 4096
"""The most sizes that are evaluated one by one on the way down."""

MOST_BEYOND = 64
"""Sizes beyond the largest that are evaluated in case they fit again."""


class Probe(NamedTuple):
    """What a job needs at one size, in bytes, and whether that does.

    `room`: what a card has for torch's allocator if the verdict is to be good enough. `accepted` may hold for more reserved bytes
    than that, if the allocator gets by once it releases cached memory.
    """

    accepted: bool
    allocated: int
    reserved: int
    room: int


class Largest(NamedTuple):
    """The largest size that does, with every smaller one; 0 where the first does not.

    `asked_from`: every size from here to the one after `size` was asked, `LEAST_ASKED` at least. What smaller ones reserve leaves
    room for `CAUTION` times the largest drop that was seen (`LEAST_DROP` at least), unless `most_asked` sizes were not enough to
    come so far; `size` itself was asked in any case.
    `again`: the largest of the `MOST_BEYOND` sizes beyond the next that does. `bounded`: `size` is where the search ends, not
    the card.
    """

    size: int
    asked_from: int
    again: int | None = None
    bounded: bool = False


def largest(probe: Callable[[int], Probe], *, ceiling: int, most_asked: int = MOST_ASKED) -> Largest:
    """The largest size from 1 to `ceiling`; `probe` is asked some thirty times, and then wherever it is close."""
    seen: dict[int, Probe] = {}

    def at(size: int) -> Probe:
        if size not in seen:
            seen[size] = probe(size)
        return seen[size]

    if not at(1).accepted:
        return Largest(0, 1, again=_again(at, after=1, ceiling=ceiling))
    good, bad = _bracket(at, ceiling)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if at(middle).accepted else (good, middle)
    lowest, asked_from = _downwards(at, seen, bad, most_asked)
    if lowest > ceiling:
        return Largest(ceiling, asked_from, bounded=True)
    return Largest(lowest - 1, asked_from, again=_again(at, after=lowest, ceiling=ceiling))


def _bracket(at: Callable[[int], Probe], ceiling: int) -> tuple[int, int]:
    """A size that fits, and a larger one that does not: `ceiling` + 1 if all evaluated sizes fit."""
    good = 1
    while good < ceiling:
        following = min(2 * good, ceiling)
        if not at(following).accepted:
            return good, following
        good = following
    return ceiling, ceiling + 1


def _downwards(at: Callable[[int], Probe], seen: dict[int, Probe], bad: int, most_asked: int) -> tuple[int, int]:
    """The lowest size that does not fit, and the lowest that was evaluated one by one."""
    lowest = bad
    for size in range(bad - 1, max(bad - 1 - most_asked, 0), -1):
        here = at(size)
        if not here.accepted:
            lowest = size
        elif (
            bad - size >= LEAST_ASKED
            and here.reserved + CAUTION * LEAST_DROP
            <= here.room  # else the largest drop, which takes all probes, decides nothing
            and here.reserved + CAUTION * _drop(seen) <= here.room
        ):
            return lowest, size
    return _below(at, lowest), max(bad - most_asked, 1)


def _below(at: Callable[[int], Probe], lowest: int) -> int:
    """Further down in growing steps, the size after one that does; `lowest` where that is so already."""
    step, passing_size = 1, lowest - 1
    while not at(passing_size).accepted:
        lowest, step = passing_size, 2 * step
        passing_size = max(passing_size - step, 1)
    while lowest - passing_size > 1:
        middle = (passing_size + lowest) // 2
        passing_size, lowest = (middle, lowest) if at(middle).accepted else (passing_size, middle)
    return lowest


def _drop(seen: dict[int, Probe]) -> int:
    """The largest drop of reserved bytes from a size to a larger one."""
    drop = most = 0
    for _, probe in sorted(seen.items()):
        most = max(most, probe.reserved)
        drop = max(drop, most - probe.reserved)
    return drop


def _again(at: Callable[[int], Probe], *, after: int, ceiling: int) -> int | None:
    """The largest size that fits beyond one that does not, as long as allocated bytes alone leave room."""
    again = None
    for size in range(after + 1, min(ceiling, after + MOST_BEYOND) + 1):
        here = at(size)
        if here.allocated > here.room:
            break
        if here.accepted:
            again = size
    return again
