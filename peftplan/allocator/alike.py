"""Programs that begin alike, as those of ranks do whose optimizers have states of unlike tensors: what they share runs once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache

from peftplan.allocator import program as events
from peftplan.allocator.program import COMPILED, WIDTH, Program, Replayed, replay

try:
    from peftplan.allocator._replay import MOST_ALIKE, replay_alike
except ImportError:  # not compiled, or before it knew them
    MOST_ALIKE = 0

ITEM = 8 * WIDTH
"""Bytes of an event."""
SIZES_OF = {events.TAKE: 1, events.HOLD: 2, events.MAKE: 2, events.ADD: 2, events.FREE: 2, events.OWN: 2, events.HAND: 3}
"""Which of an event's integers is a place in the table of sizes."""


def replay_all(
    runs: Sequence[tuple[Program, Sequence[int]]], *, ties_by_address: bool = False, expandable: bool = False
) -> list[Replayed]:
    """`program.replay` of each of these programs."""
    programs = [program for program, _ in runs]
    counts = {(len(program.phases), program.storages, program.handles, program.streams) for program in programs}
    if COMPILED and 1 < len(runs) <= MOST_ALIKE and len(counts) == 1:
        prefix, suffix, same_sizes = _in_common(tuple(program.events for program in programs))
        first = programs[0]
        try:
            tables = [array("q", sizes).tobytes() for _, sizes in runs]
        except OverflowError:
            tables = []
        counted = first.storages, first.handles, len(first.phases)
        each = tables and replay_alike(
            [program.events for program in programs], tables, prefix, suffix, same_sizes, *counted, ties_by_address, expandable
        )
        if each:
            return [
                Replayed({phase: n for phase, n in zip(first.phases, allocated, strict=True) if n >= 0}, reserved)
                for reserved, *allocated in each
            ]
    return [replay(program, sizes, ties_by_address=ties_by_address, expandable=expandable) for program, sizes in runs]


@lru_cache(maxsize=4)
def _in_common(of_programs: tuple[bytes, ...]) -> tuple[int, int, int]:
    """How many events all of these programs begin with, and end with; how many places of the tables of sizes the first name."""
    first, *others = of_programs
    least = min(map(len, of_programs)) // ITEM
    prefix = min(_shared(first, other, least) for other in others)
    suffix = min(_shared(first, other, least - prefix, from_end=True) for other in others)
    return prefix, suffix, max(_places(first[: prefix * ITEM]), default=-1) + 1


def _shared(one: bytes, other: bytes, most: int, *, from_end: bool = False) -> int:
    """How many events two programs begin or end with, up to `most`."""
    shared = 0
    while shared < most:
        middle = (shared + most + 1) // 2
        parts = [each[len(each) - middle * ITEM :] if from_end else each[: middle * ITEM] for each in (one, other)]
        shared, most = (middle, most) if parts[0] == parts[1] else (shared, middle - 1)
    return shared


def _places(part: bytes) -> set[int]:
    """The places of the table of sizes that events name."""
    integers = array("q", part)
    operands = [integers[operand::WIDTH] for operand in range(WIDTH)]
    return {operands[SIZES_OF[what]][at] for at, what in enumerate(operands[0]) if what in SIZES_OF}
