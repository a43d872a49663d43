"""A recorded run through the allocator's model: an event log of this program, or a snapshot of torch, with other options or less
memory than it was recorded with. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from peftplan import files
from peftplan.allocator import eventlog
from peftplan.allocator.config import AllocatorConfig, parse_config
from peftplan.allocator.events import Event
from peftplan.allocator.pickles import MAGIC
from peftplan.allocator.replay import Replay, replay
from peftplan.allocator.snapshots import read_trace
from peftplan.job.script import Script


@dataclass(frozen=True, slots=True)
class Replayed:
    """A replay, and what it was of. `recorded_peak_reserved` and `untraced` are a snapshot's own: the peak of its segments, and
    blocks that its recording began too late for.
    """

    source: str
    title: str
    num_events: int
    capacity_bytes: int | None
    result: Replay
    failed: Event | None
    free_at_peak: int
    """Reserved bytes that no tensor used when allocated bytes were highest."""
    rounded_at_peak: int
    """Bytes by which the blocks of tensors exceeded their requests at that moment."""
    recorded_peak_reserved: int | None = None
    untraced: int = 0


def replay_file(
    path: Path | str,
    *,
    capacity_bytes: int | None = None,
    alloc_conf: str | None = None,
    torch: str | None = None,
    device: int = 0,
    device_bytes: int | None = None,
) -> Replayed:
    """Replay a file. `alloc_conf`: as in `PYTORCH_ALLOC_CONF`; without it a snapshot keeps the options it was recorded under,
    and a log gets torch's defaults. `torch`: the version whose order of equal free blocks it is, which no file says; None: one
    like 2.13. Raises InputError, UnknownNameError or RefusedError for a file that is not understood.
    """
    config = None if alloc_conf is None else parse_config(alloc_conf)
    by_address = Script.on(torch=torch).ties_by_address
    if _begins_with_pickle(path):
        trace = read_trace(path, device=device)
        own = (trace.peak_reserved, trace.untraced)
        ordered = replace(config or trace.config, ties_by_address=by_address)
        return _replayed("torch snapshot", "", trace.events, ordered, capacity_bytes, device_bytes, *own)
    log = eventlog.load(path)
    ordered = replace(config or AllocatorConfig(), ties_by_address=by_address)
    return _replayed("event log", log.title, log.events, ordered, capacity_bytes, device_bytes)


def _replayed(
    source: str,
    title: str,
    events: tuple[Event, ...],
    config: AllocatorConfig,
    capacity_bytes: int | None,
    device_bytes: int | None,
    recorded: int | None = None,
    untraced: int = 0,
) -> Replayed:
    result = replay(events, config, capacity_bytes, device_bytes=device_bytes, timeline=True)
    line, at = result.timeline, result.peaks.allocated_at
    assert line is not None
    return Replayed(
        source=source,
        title=title,
        num_events=len(events),
        capacity_bytes=capacity_bytes,
        result=result,
        failed=None if result.oom is None else events[result.oom.event],
        free_at_peak=0 if at < 0 else line.reserved[at] - line.allocated[at],
        rounded_at_peak=0 if at < 0 else line.allocated[at] - line.requested[at],
        recorded_peak_reserved=recorded,
        untraced=untraced,
    )


def _begins_with_pickle(path: Path | str) -> bool:
    return files.beginning(path, field="file", most=1) == MAGIC
