"""Read what `torch.cuda.memory._dump_snapshot()` wrote, without running anything in it, and compare a replay with it.

Source: torch/cuda/memory.py (`_snapshot`), c10/core/CachingDeviceAllocator.h (`TraceEntry`), torch 2.13. Sizes of `alloc` entries
are the bytes asked for, before rounding (as remembered of the .cpp; check on a real snapshot). `empty_cache` is not recorded, so
each run of `segment_free` / `segment_unmap` is read as one; that is exact also for a release before an out-of-memory or a
retry, not for the partial releases of `max_split_size_mb` and garbage collection. A free counts where it completed, so memory
that waited for another stream (`record_stream`) counts as allocated until then.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

from peftplan.errors import InputError, PeftplanError, RefusedError, UnknownNameError
from peftplan.memory.allocator.config import AllocatorConfig, parse_config
from peftplan.memory.allocator.device import ENDLESS, SegmentEvent
from peftplan.memory.allocator.events import Event
from peftplan.memory.allocator.replay import Replay, replay

ACTIONS = (
    "alloc",
    "free_requested",
    "free_completed",
    "segment_alloc",
    "segment_free",
    "segment_map",
    "segment_unmap",
    "oom",
    "snapshot",
)
DEFAULT_POOL = (0, 0)


class _ContainersOnly(pickle.Unpickler):
    """Dicts, lists, tuples, sets, text, numbers: they need no name to be looked up, and nothing else is let in."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise RefusedError(f"the snapshot names {f'{module}.{name}'!r}: only plain containers, text and numbers are read")


@dataclass(frozen=True, slots=True)
class RecordedTrace:
    """One device of a snapshot. `untraced`: live blocks at the end plus frees in between that the trace never saw allocated."""

    config: AllocatorConfig
    events: tuple[Event, ...]
    segment_events: tuple[SegmentEvent, ...]
    segments: tuple[dict[str, Any], ...]
    untraced: int

    @property
    def peak_reserved(self) -> int:
        """Highest bytes of all segments, by the segment events of the trace."""
        return _peak(self.segment_events)

    @property
    def reserved(self) -> int:
        """Bytes of the segments that the snapshot ends with."""
        return sum(segment["total_size"] for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A replay beside the record: reserved bytes at the peak and at the end, and the first segment event that differs."""

    replayed: Replay
    recorded_peak_reserved: int
    recorded_reserved: int
    first_difference: tuple[SegmentEvent | None, SegmentEvent | None] | None
    """(recorded, replayed); None where all are equal."""


def load_snapshot(path: Path | str) -> dict[str, Any]:
    """The dictionary in a snapshot file; a pickle that names any class or function is refused."""
    try:
        with open(path, "rb") as file:
            snapshot = _ContainersOnly(file).load()
    except RefusedError:
        raise
    except OSError as error:
        raise InputError("snapshot", str(path), f"it cannot be read: {error}") from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError("snapshot", str(path), f"it is not a pickle of plain containers: {error}") from error
    if not isinstance(snapshot, dict) or not {"segments", "device_traces"} <= snapshot.keys():
        raise InputError("snapshot", str(path), "accepted: what torch.cuda.memory._dump_snapshot() writes")
    return snapshot


def read_trace(path: Path | str, *, device: int = 0) -> RecordedTrace:
    """The trace of one device, as events; recording must have begun before the first allocation for a replay to agree."""
    snapshot = load_snapshot(path)
    try:
        traces = snapshot["device_traces"]
        if not 0 <= device < len(traces):
            raise InputError("device", device, f"the snapshot has {len(traces)} devices, counted from 0")
        reading = _Reading()
        for entry in traces[device]:
            reading.add(entry)
        segments = tuple(segment for segment in snapshot["segments"] if segment.get("device", 0) == device)
        settings = snapshot.get("allocator_settings", {}).get("PYTORCH_CUDA_ALLOC_CONF", "")
        return RecordedTrace(
            config=parse_config(settings),
            events=tuple(reading.events),
            segment_events=tuple(reading.segment_events),
            segments=segments,
            untraced=reading.unmatched_frees + _untraced(segments, reading.live),
        )
    except PeftplanError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError("snapshot", str(path), f"a field is missing or has another shape: {error!r}") from error


def compare(trace: RecordedTrace) -> Comparison:
    """Replay the trace under its own options, without a capacity (what was released on failure is in the events)."""
    replayed = replay(trace.events, trace.config)
    pairs = zip_longest(trace.segment_events, replayed.segment_events)
    return Comparison(
        replayed=replayed,
        recorded_peak_reserved=trace.peak_reserved,
        recorded_reserved=trace.reserved,
        first_difference=next((pair for pair in pairs if pair[0] != pair[1]), None),
    )


class _Reading:
    """Entries so far: events, segment events, and which address holds which allocation."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.segment_events: list[SegmentEvent] = []
        self.live: dict[int, int] = {}
        self.unmatched_frees = 0
        self._allocations = 0
        self._releasing = False

    def add(self, entry: dict[str, Any]) -> None:
        action, size, stream = entry["action"], int(entry["size"]), int(entry["stream"])
        if action not in ACTIONS:
            raise UnknownNameError("snapshot, action", action, ACTIONS)
        if action != "oom" and not 0 <= size < ENDLESS:
            raise InputError("snapshot, size", size, "accepted: bytes that a device can have")
        if tuple(entry.get("pool_id", entry.get("segment_pool_id", DEFAULT_POOL))) != DEFAULT_POOL:
            raise RefusedError("the snapshot uses private memory pools (CUDA graphs, MemPool), which are not modelled")
        if action in ("segment_free", "segment_unmap"):
            if not self._releasing:
                self.events.append(Event("empty_cache", stream=stream))
            self.segment_events.append(SegmentEvent(len(self.events) - 1, action, size))
        elif action in ("segment_alloc", "segment_map"):
            self.segment_events.append(SegmentEvent(len(self.events), action, size))  # belongs to the alloc that follows
        elif action == "alloc":
            if entry["addr"] in self.live:
                raise RefusedError("the snapshot allocates an address twice: its recording left out frees")
            self._allocations += 1
            self.live[entry["addr"]] = self._allocations
            self.events.append(Event("alloc", self._allocations, size, stream, op=_op(entry)))
        elif action == "free_completed":
            self._free(entry["addr"], stream)
        elif action in ("oom", "snapshot"):
            self.events.append(Event("mark", nbytes=size, stream=stream, op=action))
        self._releasing = action in ("segment_free", "segment_unmap")

    def _free(self, address: int, stream: int) -> None:
        if address in self.live:
            self.events.append(Event("free", self.live.pop(address), stream=stream))
        else:
            self.unmatched_frees += 1


def _op(entry: dict[str, Any]) -> str:
    frames = entry.get("frames") or ()
    return str(frames[0]["name"]) if frames else ""


def _untraced(segments: Iterable[dict[str, Any]], live: dict[int, int]) -> int:
    blocks = (block for segment in segments for block in segment["blocks"])
    return sum(block["state"] != "inactive" and block["address"] not in live for block in blocks)


def _peak(segment_events: Iterable[SegmentEvent]) -> int:
    reserved = peak = 0
    for event in segment_events:
        reserved += event.nbytes if event.action in ("segment_alloc", "segment_map") else -event.nbytes
        peak = max(peak, reserved)
    return peak
