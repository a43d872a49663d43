"""Programs that do the same for a while, as those of ranks: the compiled replay runs what they share once."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from peftplan.allocator.program import COMPILED, GROWS, Program, Replayed, replay

try:
    from peftplan.allocator._replay import MOST_ALIKE, STREAMS, replay_several
except ImportError:  # not compiled, or before it knew them
    MOST_ALIKE = STREAMS = 0

FEW = 800
"""Events that each program runs on its own where they are all that it shares: they take no longer than a copy of the blocks."""


def replay_all(
    runs: Sequence[tuple[Program, Sequence[int]]], *, ties_by_address: bool = False, expandable: bool = False
) -> list[Replayed]:
    """`program.replay` of each of these programs."""
    known = COMPILED and (GROWS or not expandable) and all(program.streams <= STREAMS for program, _ in runs)
    if known and 1 < len(runs) <= MOST_ALIKE:
        try:
            programs = [(p.events, array("q", sizes).tobytes(), p.storages, p.handles, len(p.phases)) for p, sizes in runs]
            each = replay_several(programs, FEW, ties_by_address, expandable)
        except OverflowError:  # more than 64 bits hold
            each = None
        if each is not None:
            return [
                Replayed({phase: n for phase, n in zip(program.phases, allocated, strict=True) if n >= 0}, reserved)
                for (program, _), (reserved, *allocated) in zip(runs, each, strict=True)
            ]
    return [replay(program, sizes, ties_by_address=ties_by_address, expandable=expandable) for program, sizes in runs]
