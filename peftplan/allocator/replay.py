"""Replay of an event log: allocated, requested and reserved bytes over time, their peaks by phase, and where memory ran out."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from peftplan.allocator.config import AllocatorConfig
from peftplan.allocator.core import Allocator
from peftplan.allocator.device import SegmentEvent
from peftplan.allocator.events import Event
from peftplan.allocator.oom import OutOfMemory
from peftplan.allocator.segments import Segment
from peftplan.allocator.stats import Peaks


@dataclass(frozen=True, slots=True)
class Timeline:
    """Bytes after each event, one entry per event."""

    allocated: array[int]
    requested: array[int]
    reserved: array[int]


@dataclass(frozen=True, slots=True)
class Replay:
    """The result of a log; event indices count from 0. After an out-of-memory error nothing more was replayed."""

    peaks: Peaks
    by_phase: dict[str, Peaks]
    allocated: int
    requested: int
    reserved: int
    segments: list[Segment]
    segment_events: tuple[SegmentEvent, ...]
    oom: OutOfMemory | None
    timeline: Timeline | None


def replay(
    events: Iterable[Event],
    config: AllocatorConfig | None = None,
    capacity_bytes: int | None = None,
    *,
    device_bytes: int | None = None,
    timeline: bool = False,
) -> Replay:
    """Run the events through an empty allocator, up to the first request that does not fit."""
    allocator = Allocator(config, capacity_bytes, device_bytes=device_bytes)
    series = Timeline(array("q"), array("q"), array("q")) if timeline else None
    oom, phase = None, ""
    for event in events:
        if event.phase != phase:
            phase = event.phase
            allocator.begin_phase(phase)
        oom = apply(allocator, event)
        if series is not None:
            series.allocated.append(allocator.allocated)
            series.requested.append(allocator.requested)
            series.reserved.append(allocator.reserved)
        if oom is not None:
            break
    return Replay(
        peaks=allocator.peaks,
        by_phase=allocator.peaks_by_phase,
        allocated=allocator.allocated,
        requested=allocator.requested,
        reserved=allocator.reserved,
        segments=allocator.snapshot(),
        segment_events=allocator.history,
        oom=oom,
        timeline=series,
    )


def apply(allocator: Allocator, event: Event) -> OutOfMemory | None:
    """One event, whatever its phase."""
    if event.kind == "alloc":
        return allocator.malloc(event.id, event.nbytes, event.stream)
    if event.kind == "free":
        allocator.free(event.id)
    elif event.kind == "empty_cache":
        allocator.empty_cache()
    else:
        allocator.mark()
    return None
