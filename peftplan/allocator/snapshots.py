"""Read what `torch.cuda.memory._dump_snapshot()` wrote, without running anything in it, and compare a replay with it.

Source: torch/cuda/memory.py (`_snapshot`), c10/core/CachingDeviceAllocator.h (`TraceEntry`), torch. Sizes of `alloc` entries
are the bytes asked for, before rounding (as remembered of the .cpp; check on a real snapshot). `empty_cache` is not recorded, so
each run of `segment_free` / `segment_unmap` is read as one; that is exact also for a release before an out-of-memory or a
retry, not for the partial releases of `max_split_size_mb` and garbage collection. A free counts where it completed, so memory
that waited for another stream (`record_stream`) counts as allocated until then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal, TypedDict, TypeVar, cast, get_args

from peftplan import files
from peftplan.allocator import pickles
from peftplan.allocator.config import AllocatorConfig, parse_config
from peftplan.allocator.device import ENDLESS, SegmentEvent
from peftplan.allocator.events import Event
from peftplan.allocator.replay import Replay, replay
from peftplan.errors import InputError, PeftplanError, RefusedError, UnknownNameError

Action = Literal[
    "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap", "oom",
    "snapshot",
]  # fmt: skip
ACTIONS: tuple[Action, ...] = get_args(Action)
DEFAULT_POOL = (0, 0)
MOST_ENTRIES = 2**21
"""Of one device's trace, and blocks of its segments. A pickle can hold the same entry millions of times in a few bytes."""
MOST_OF_A_NAME = 1000
"""Characters that are kept of a frame's name; C++ symbols are long."""


Item = TypeVar("Item")


class Frame(TypedDict, total=False):
    """A frame of a stack, the innermost first."""

    filename: str
    line: int
    name: str


class Entry(TypedDict, total=False):
    """An allocation, a free or a segment's, in a device's trace; or a block of a segment."""

    action: Action
    addr: int
    size: int
    stream: int
    frames: list[Frame] | None
    device_free: int
    pool_id: object
    segment_pool_id: object
    address: int
    state: str


class Segment(TypedDict, total=False):
    """A segment that the allocator holds, with its blocks."""

    device: int
    total_size: int
    blocks: list[Entry]


class Snapshot(TypedDict, total=False):
    """What torch writes. A file may hold anything under these keys: `trace_of` raises InputError where it is read."""

    segments: list[Segment]
    device_traces: list[list[Entry]]
    allocator_settings: dict[str, object]


@dataclass(frozen=True, slots=True)
class RecordedTrace:
    """One device of a snapshot. `untraced`: live blocks at the end plus frees in between that the trace never saw allocated."""

    config: AllocatorConfig
    events: tuple[Event, ...]
    segment_events: tuple[SegmentEvent, ...]
    segments: tuple[Segment, ...]
    untraced: int

    @property
    def peak_reserved(self) -> int:
        """Highest bytes of all segments, by the segment events of the trace."""
        return _peak(self.segment_events)

    @property
    def reserved(self) -> int:
        """Bytes of the segments that the snapshot ends with."""
        return sum(_integer(segment, "total_size") for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A replay beside the record: reserved bytes at the peak and at the end, and the first segment event that differs."""

    replayed: Replay
    recorded_peak_reserved: int
    recorded_reserved: int
    first_difference: tuple[SegmentEvent | None, SegmentEvent | None] | None
    """(recorded, replayed); None where all are equal."""


def load_snapshot(path: Path | str) -> Snapshot:
    """The dictionary in a snapshot file; a pickle that names any class or function is refused."""
    content = files.content(path, field="file", most=pickles.MOST_BYTES)
    try:
        snapshot = pickles.load(content)
    except (RefusedError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError("file", str(path), f"not a snapshot (a pickle of plain containers): {error}") from error
    if not isinstance(snapshot, dict) or not {"segments", "device_traces"} <= snapshot.keys():
        raise InputError("file", str(path), "not a snapshot; accepted: what torch.cuda.memory._dump_snapshot() writes")
    return cast("Snapshot", snapshot)


def read_trace(path: Path | str, *, device: int = 0) -> RecordedTrace:
    """The trace of one device, as events; recording must have begun before the first allocation for a replay to agree."""
    return trace_of(load_snapshot(path), path, device=device)


def trace_of(snapshot: Snapshot, path: Path | str, *, device: int = 0) -> RecordedTrace:
    """The trace of one device of a snapshot that was read from `path`."""
    try:
        traces = _list(snapshot["device_traces"], "device_traces")
        if not 0 <= device < len(traces):
            raise InputError("device", device, f"the snapshot has {len(traces)} devices, counted from 0")
        reading = _Reading()
        for entry in _list(traces[device], "device_traces"):
            reading.add(entry)
        segments = tuple(s for s in _list(snapshot["segments"], "segments") if s.get("device", 0) == device)
        settings = snapshot.get("allocator_settings", {}).get("PYTORCH_CUDA_ALLOC_CONF", "")
        if type(settings) is not str:
            raise InputError("file: PYTORCH_CUDA_ALLOC_CONF", settings, "accepted: a string")
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
        raise InputError("file", str(path), f"a field is missing or has another shape: {error!r}") from error


def _list(value: list[Item], key: str) -> list[Item]:
    """A list of a length that can be read. Raises InputError otherwise."""
    if type(value) is not list or len(value) > MOST_ENTRIES:
        raise InputError(f"file: {key}", value, f"accepted: a list of at most {MOST_ENTRIES} entries")
    return value


def _integer(fields: Mapping[str, object], key: str) -> int:
    if type(number := fields[key]) is not int:
        raise InputError(f"file: {key}", number, "accepted: a whole number")
    return number


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

    def add(self, entry: Entry) -> None:
        action, size, stream = entry["action"], _integer(entry, "size"), _integer(entry, "stream")
        if action not in ACTIONS:
            raise UnknownNameError("file: action", action, ACTIONS)
        if action != "oom" and not 0 <= size < ENDLESS:
            raise InputError("file: size", size, "accepted: a number of bytes that a device can hold")
        if entry.get("pool_id", entry.get("segment_pool_id", DEFAULT_POOL)) not in (DEFAULT_POOL, list(DEFAULT_POOL)):
            raise RefusedError("the snapshot uses private memory pools (CUDA graphs, MemPool), which are not modelled")
        if action in ("segment_free", "segment_unmap"):
            if not self._releasing:
                self.events.append(Event("empty_cache", stream=stream))
            self.segment_events.append(SegmentEvent(len(self.events) - 1, action, size))
        elif action in ("segment_alloc", "segment_map"):
            self.segment_events.append(SegmentEvent(len(self.events), action, size))  # belongs to the alloc that follows
        elif action == "alloc":
            if (address := _integer(entry, "addr")) in self.live:
                raise RefusedError("the snapshot allocates an address twice without a free between: its recording is incomplete")
            self._allocations += 1
            self.live[address] = self._allocations
            self.events.append(Event("alloc", self._allocations, size, stream, op=_op(entry)))
        elif action == "free_completed":
            self._free(_integer(entry, "addr"), stream)
        elif action in ("oom", "snapshot"):
            self.events.append(Event("mark", nbytes=size, stream=stream, op=action))
        self._releasing = action in ("segment_free", "segment_unmap")

    def _free(self, address: int, stream: int) -> None:
        if address in self.live:
            self.events.append(Event("free", self.live.pop(address), stream=stream))
        else:
            self.unmatched_frees += 1


def _op(entry: Entry) -> str:
    frames = entry.get("frames") or ()
    name = frames[0]["name"] if frames else ""
    if type(name) is not str:
        raise InputError("file: name", name, "accepted: a string")
    return name[:MOST_OF_A_NAME]


def _untraced(segments: tuple[Segment, ...], live: dict[int, int]) -> int:
    """Raises InputError where there are more blocks than can be read."""
    number = sum(len(_list(segment["blocks"], "blocks")) for segment in segments)
    if number > MOST_ENTRIES:
        raise InputError("file: blocks", number, f"accepted: at most {MOST_ENTRIES}")
    blocks = (block for segment in segments for block in segment["blocks"])
    return sum(block["state"] != "inactive" and _integer(block, "address") not in live for block in blocks)


def _peak(segment_events: Iterable[SegmentEvent]) -> int:
    reserved = peak = 0
    for event in segment_events:
        reserved += event.nbytes if event.action in ("segment_alloc", "segment_map") else -event.nbytes
        peak = max(peak, reserved)
    return peak
