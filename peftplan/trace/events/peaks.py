"""Compute the peak of each phase from a log of allocations, and the tensors alive at each peak."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from peftplan.depth.log import Moment, Storage, category_of
from peftplan.ledger import Category
from peftplan.units import round512

PHASES = ("load", "forward", "backward", "step")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Alive:
    """Storages of one kind alive at a peak: `copies` of one shape and dtype, made by one operation of one module kind."""

    category: Category
    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    copies: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest sum of rounded storages in one phase, and what it consists of, largest first."""

    bytes: int
    alive: tuple[Alive, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the log, from `start` up to `end`, that belongs to one phase of load or of the steady step."""

    phase: str
    start: int
    end: int


def windows(began: Sequence[tuple[int, str]], *, length: int, started: int) -> tuple[Window, ...]:
    """The reported windows: load, and the phases that began after the first `started` ones."""
    ends = [start for start, _ in began[1:]] + [length]
    every = [Window(phase, start, end) for (start, phase), end in zip(began, ends, strict=True)]
    return (every[0], *every[started:])


def peaks(log: Sequence[Moment], windows: Sequence[Window]) -> dict[str, Peak]:
    """The peak of each phase over its windows. A window starts with what is already alive."""
    best: dict[str, tuple[int, int]] = {}
    level, index = 0, 0
    for window in windows:
        for at in range(index, window.end + 1):
            if at >= window.start and level > best.get(window.phase, (-1, 0))[0]:
                best[window.phase] = (level, at)
            if at < window.end:
                size = round512(log[at].storage.nbytes)
                level += size if log[at].kind == "alloc" else -size
        index = window.end
    return {phase: Peak(best[phase][0], alive_at(log, best[phase][1])) for phase in PHASES if phase in best}


def alive_at(log: Sequence[Moment], end: int) -> tuple[Alive, ...]:
    """The storages that the first `end` entries of the log leave alive, grouped, largest first."""
    living: dict[int, Storage] = {}
    for moment in log[:end]:
        if moment.kind == "alloc":
            living[moment.storage.id] = moment.storage
        else:
            living.pop(moment.storage.id, None)
    groups: dict[tuple[Category, str, str, tuple[int, ...], str], list[int]] = {}
    for s in living.values():
        name = _INDEX.sub("{}", s.name or s.module)
        groups.setdefault((category_of(s), name, s.op, s.shape, s.dtype), []).append(round512(s.nbytes))
    alive = [Alive(*key, len(sizes), sum(sizes)) for key, sizes in groups.items()]
    return tuple(sorted(alive, key=lambda group: -group.bytes))
