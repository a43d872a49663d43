"""A recorded trace: its steady step as a series of memory levels, and its event log as a file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import compress

from peftplan.allocator import eventlog
from peftplan.allocator.config import AllocatorConfig
from peftplan.allocator.events import Event
from peftplan.allocator.replay import replay
from peftplan.depth.log import Moment, category_of
from peftplan.ledger import CATEGORIES, Category
from peftplan.results.series import Group, Series, Span, extremes
from peftplan.trace.result import Traced
from peftplan.units import round512

MOST_POINTS = 1600
"""Points of a series: more than a screen has columns. A step of a 70 B model has 70,000 events."""
LARGEST = 6
"""Groups named at each point."""
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Recorded:
    """What `peftplan.results.series.Recording` asks for, from a trace: `events` are its log as it was replayed, with the cache
    emptied here and there, under `allocator`.
    """

    traced: Traced
    events: Sequence[Event]
    allocator: AllocatorConfig

    def save(self, path: str, *, title: str) -> None:
        """Write the event log, loading and the first step included, so that a replay starts with an empty device."""
        eventlog.save(self.events, path, title=title)

    def series(self) -> Series:
        """Levels at the highest and lowest moments of the steady step. All categories add up to what the allocator counts as
        allocated: the tails of blocks that it hands out whole are temporaries.
        """
        traced = self.traced
        steady = [window for window in traced.windows if window.phase != "load"]
        start, end = steady[0].start, steady[-1].end
        line = replay(self.events, self.allocator, timeline=True).timeline
        assert line is not None
        of_log = [event.kind != "empty_cache" for event in self.events]
        allocated, reserved = (list(compress(levels, of_log)) for levels in (line.allocated, line.reserved))
        # Entry i is the level after event i; time 0 is the level that the step meets, after event start - 1.
        points = extremes(allocated[start - 1 : end], most=MOST_POINTS)
        levels, largest = _states(traced.log, [start + time for time in points])
        for of_time, time in zip(levels, points, strict=True):
            of_time["temporaries"] += allocated[start - 1 + time] - sum(of_time.values())
        return Series(
            times=points,
            by_category={c: [of_time[c] for of_time in levels] for c in CATEGORIES if any(of_time[c] for of_time in levels)},
            phases=[Span(window.phase, window.start - start, window.end - start) for window in steady],
            reserved=[reserved[start - 1 + time] for time in points],
            largest=largest,
        )


def _states(log: Sequence[Moment], ends: Sequence[int]) -> tuple[list[dict[Category, int]], list[list[Group]]]:
    """Bytes by category, and the largest groups, after the first `end` entries of the log, for each of the ascending `ends`."""
    levels: list[dict[Category, int]] = []
    largest: list[list[Group]] = []
    for by_category, groups in _walk(log, ends):
        levels.append(dict(by_category))
        top = nlargest(LARGEST, groups.items(), key=lambda item: item[1][1])
        largest.append([Group(_label(key), copies, num_bytes) for key, (copies, num_bytes) in top if num_bytes])
    return levels, largest


def _walk(
    log: Sequence[Moment], ends: Sequence[int]
) -> Iterator[tuple[dict[Category, int], dict[tuple[str, ...], tuple[int, int]]]]:
    """The state at each of the `ends`: bytes by category, (copies, bytes) by group."""
    by_category = dict.fromkeys(CATEGORIES, 0)
    groups: dict[tuple[str, ...], tuple[int, int]] = {}
    keys: dict[int, tuple[tuple[str, ...], Category]] = {}
    position = 0
    for end in ends:
        for kind, storage, _, _ in log[position:end]:
            if kind == "alloc":
                category = category_of(storage)
                name = _INDEX.sub("*", storage.name or storage.module)
                keys[storage.id] = (category, name, storage.op, storage.dtype, "×".join(map(str, storage.shape))), category
            key, category = keys[storage.id]
            sign = 1 if kind == "alloc" else -1
            copies, num_bytes = groups.get(key, (0, 0))
            size = round512(storage.nbytes)
            groups[key] = (copies + sign, num_bytes + sign * size)
            by_category[category] += sign * size
        position = end
        yield by_category, groups


def _label(key: tuple[str, ...]) -> str:
    """`model.layers.*.mlp · activations · aten.mul.Tensor · bf16 1×2048×11008`."""
    category, name, op, dtype, shape = key
    return " · ".join(filter(None, (name, category, "" if op == "load" else op, f"{dtype} {shape}".strip())))
