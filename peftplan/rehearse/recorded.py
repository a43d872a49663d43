"""Every allocation of a rehearsed program, from its first tensor to its end: the data of a timeline, or an event log."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import groupby
from pathlib import Path

from peftplan.allocator import eventlog
from peftplan.allocator.events import Event
from peftplan.allocator.replay import replay
from peftplan.ledger import EVERY_CATEGORY, Category
from peftplan.results.series import Group, Series, Span, extremes

MOST_POINTS = 1600
"""Points of a series: more than a screen has columns."""
LARGEST = 6
"""Lines named at each point."""
COMPUTING = ("forward", "backward")


@dataclass(frozen=True)
class Recorded:
    """One device of a process: its events, and the bytes that its allocator had reserved after each."""

    device: int
    events: Sequence[Event]
    reserved: Sequence[int]

    @classmethod
    def read(cls, path: Path) -> Recorded:
        """What the program's side wrote."""
        document = json.loads(path.read_text(encoding="utf-8"))
        events = [
            Event(kind, number, size, stream, phase, category=category, name=name)
            for kind, number, size, stream, phase, category, name in document["events"]
        ]
        return cls(document["device"], events, document["reserved"])

    @property
    def peak(self) -> int:
        """The most bytes that were reserved."""
        return max(self.reserved, default=0)

    def save(self, path: str, *, title: str) -> None:
        """Write the event log; a replay starts with an empty device."""
        eventlog.save(self.events, path, title=title)

    def series(self) -> Series:
        """Levels at the highest and lowest moments of the run. Tails of blocks that the allocator hands out whole are
        temporaries, as is what a forward made once the optimizer steps.
        """
        line = replay(self.events, timeline=True).timeline
        assert line is not None
        points = extremes(line.allocated, most=MOST_POINTS)
        levels, largest = [], []
        for by_category, groups, at in self._states(points):
            of_time = dict(by_category)
            if self.events[at].phase not in COMPUTING:
                of_time["temporaries"] += of_time["activations"]
                of_time["activations"] = 0
            of_time["temporaries"] += line.allocated[at] - sum(of_time.values())
            levels.append(of_time)
            top = nlargest(LARGEST, groups.items(), key=lambda item: item[1][1])
            largest.append([Group(name, copies, size) for name, (copies, size) in top if size])
        return Series(
            times=points,
            by_category={c: [of_time[c] for of_time in levels] for c in EVERY_CATEGORY if any(of_time[c] for of_time in levels)},
            phases=list(self._spans()),
            reserved=[self.reserved[at] for at in points],
            largest=largest,
        )

    def _states(self, ends: Sequence[int]) -> Iterator[tuple[dict[Category, int], dict[str, tuple[int, int]], int]]:
        """Bytes by category, and (blocks, bytes) by line, after each of the ascending events."""
        by_category: dict[Category, int] = dict.fromkeys(EVERY_CATEGORY, 0)
        groups: dict[str, tuple[int, int]] = {}
        living: dict[int, Event] = {}
        position = 0
        for end in ends:
            for event in self.events[position : end + 1]:
                if event.kind == "alloc":
                    living[event.id] = event
                    _add(event, 1, by_category, groups)
                elif event.kind == "free":
                    _add(living.pop(event.id), -1, by_category, groups)
            position = end + 1
            yield by_category, groups, end

    def _spans(self) -> Iterator[Span]:
        """A span per phase, one after the other."""
        for phase, numbered in groupby(enumerate(self.events), key=lambda item: item[1].phase):
            numbers = [number for number, _ in numbered]
            yield Span(phase, numbers[0], numbers[-1] + 1)


def _add(event: Event, sign: int, by_category: dict[Category, int], groups: dict[str, tuple[int, int]]) -> None:
    by_category[event.category] += sign * event.nbytes  # type: ignore[index]
    blocks, size = groups.get(event.name, (0, 0))
    groups[event.name] = (blocks + sign, size + sign * event.nbytes)
