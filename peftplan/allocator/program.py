"""A run as integers: what is allocated and freed, in order, built once for all sizes and replayed at any.

A program holds the events of loading and of some steps. An event names its size by a place in a table, so that a job at another
batch size is another table. `replay` feeds it to a model of torch's caching allocator, with default options or in segments that
grow: to the compiled `_replay` where it was built, else event by event to `allocator` (`interpret`). Both give the same bytes.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from peftplan.allocator.blocks import Block
    from peftplan.allocator.core import Allocator
    from peftplan.allocator.events import Event

try:
    from peftplan.allocator import _replay
except ImportError:  # no C compiler where it was installed
    _replay = None  # type: ignore[assignment]

(
    PHASE,  # a phase begins: its number
    TAKE,  # size, count: for good
    HOLD,  # handle, size
    LET_GO,  # handle
    MAKE,  # storage, size, count, stream
    ADD,  # storage, size: one more of it
    FREE,  # storage, size, count
    OUTPUTS,  # storage: the caller still holds it
    END_OUTPUTS,  # the caller lets go
    REPEAT,  # kinds of layers that take turns; each follows as a LAYER with its events
    LAYER,  # how many, number of events
    OWN,  # storage, size, count: of one layer
    END_OWN,  # storage
    HAND,  # storage, the one in its place, size, count
    EMPTY,  # torch.cuda.empty_cache()
    END,  # of a step: gradients go
    LEAVE,  # storage: what lives of it stays for good
) = range(17)
OPTIONS = {False: "default options", True: "expandable_segments:True"}
"""Whether segments grow → the options of torch's allocator, in words."""
COMPILED = _replay is not None and getattr(_replay, "EVENTS", None) == LEAVE + 1
"""Whether the compiled replay is there, of the events of today (in a checkout it may have been built before)."""
GROWS = COMPILED and hasattr(_replay, "GROWS")
"""Whether it also knows segments that grow."""
WIDTH = 5
"""Integers of an event: what, and up to four operands."""


class Program(NamedTuple):
    """Events in order, `WIDTH` integers of 64 bits each; how many storages and handles they name; the names of the phases."""

    events: bytes
    storages: int
    handles: int
    phases: tuple[str, ...]
    streams: int = 1
    """CUDA streams on which something is made."""


class Replayed(NamedTuple):
    """Phase → allocated bytes at its peak, of the phases that had events; the most that was reserved."""

    allocated: dict[str, int]
    reserved: int


def of_log(log: "Iterable[Event]") -> tuple[Program, list[int]]:
    """A log of allocations, frees and emptied caches as a program, with its table of sizes."""
    handles: dict[int, int] = {}
    storages: dict[int, tuple[int, int]] = {}
    """Of streams besides the default one: storage and size."""
    streams = {0: 0}
    sizes: dict[int, int] = {}
    phases: dict[str, int] = {}
    events = array("q")
    before = None
    for kind, number, nbytes, stream, phase, *_ in log:
        if phase != before:
            before = phase
            events.extend((PHASE, phases.setdefault(phase, len(phases)), 0, 0, 0))
        if kind == "alloc" and stream:
            storages[number] = len(storages), sizes.setdefault(nbytes, len(sizes))
            events.extend((MAKE, *storages[number], 1, streams.setdefault(stream, len(streams))))
        elif kind == "alloc":
            handle = handles.setdefault(number, len(handles))
            events.extend((HOLD, handle, sizes.setdefault(nbytes, len(sizes)), 0, 0))
        elif kind == "free" and number in storages:
            events.extend((FREE, *storages[number], 1, 0))
        elif kind == "free":
            events.extend((LET_GO, handles[number], 0, 0, 0))
        elif kind == "empty_cache":
            events.extend((EMPTY, 0, 0, 0, 0))
    return Program(events.tobytes(), len(storages), len(handles), tuple(phases), len(streams)), [*sizes]


def runs_within(
    program: Program, sizes: Sequence[int], capacity: int, *, ties_by_address: bool = False, expandable: bool = False
) -> bool:
    """Whether a program runs where the device cannot give more than `capacity` bytes."""
    try:
        replay(program, sizes, ties_by_address=ties_by_address, expandable=expandable, capacity=capacity)
    except MemoryError:
        return False
    return True


def replay(
    program: Program,
    sizes: Sequence[int],
    *,
    ties_by_address: bool = False,
    expandable: bool = False,
    capacity: int | None = None,
) -> Replayed:
    """The peaks of a program at these sizes. `expandable`: in segments that grow (`expandable_segments:True`).

    Raises MemoryError where the device cannot give more than `capacity` bytes.
    """
    if (GROWS if expandable else COMPILED) and program.streams <= getattr(_replay, "STREAMS", 1):
        try:
            table = array("q", sizes).tobytes()
            limit = -1 if capacity is None else max(0, capacity)
            counts = program.storages, program.handles, len(program.phases)
            peaks = _replay.replay(program.events, table, *counts, ties_by_address, limit, *((True,) if expandable else ()))
        except OverflowError:  # more than 64 bits hold
            pass
        else:
            reserved, *allocated = peaks
            return Replayed({phase: n for phase, n in zip(program.phases, allocated, strict=True) if n >= 0}, reserved)
    return interpret(program, sizes, ties_by_address=ties_by_address, expandable=expandable, capacity=capacity)


def interpret(
    program: Program,
    sizes: Sequence[int],
    *,
    ties_by_address: bool = False,
    expandable: bool = False,
    capacity: int | None = None,
) -> Replayed:
    """As `replay`, through the allocator's model: slower, and what the compiled replay is tested against."""
    from peftplan.allocator.config import AllocatorConfig
    from peftplan.allocator.core import Allocator

    run = _Run(
        program, sizes, Allocator(AllocatorConfig(ties_by_address=ties_by_address, expandable_segments=expandable), capacity)
    )
    run.events(0, len(run.program))
    allocated = {phase: peaks.allocated for phase, peaks in run.allocator.peaks_by_phase.items() if phase}
    return Replayed(allocated, run.allocator.peaks.reserved)


class _Run:
    """Blocks by the storage of the tape that they are for."""

    def __init__(self, program: Program, sizes: Sequence[int], allocator: "Allocator") -> None:
        self.program = memoryview(program.events).cast("q")
        self.phases, self.sizes, self.allocator = program.phases, sizes, allocator
        self._handles: dict[int, Block | None] = {}
        self._live: dict[int, list[Block | None]] = {}
        self._outputs: list[Block | None] = []
        self._spare: dict[int, list[int]] = {}
        """Bytes → storages that were made more than once."""
        self._places: dict[int, int] = {}
        """What a copied layer hands on → the storage in whose place it stands."""
        self._own: dict[int, list[Block | None]] = {}
        self._handed: dict[int, int] = {}

    def events(self, start: int, stop: int) -> None:
        """Run the events from one place to another."""
        events, allocator, at = self.program, self.allocator, start
        while at < stop:
            what, a, b, c, d = events[at : at + WIDTH]
            at += WIDTH
            if what == OWN:
                self._own[a] = self._allocate(b, c)
            elif what == END_OWN:
                self._release(self._own.pop(a))
            elif what == MAKE:
                self._make(a, b, c, stream=d)
            elif what == FREE:
                self._free(a, b, c)
            elif what == HAND:
                self._hand(a, b, c, d)
            elif what == HOLD:
                self._handles[a] = allocator.allocate(self.sizes[b])
            elif what == LET_GO:
                allocator.release(self._handles.pop(a))
            elif what == TAKE:
                self._allocate(a, b)
            elif what == ADD:
                self._live.setdefault(a, []).extend(self._allocate(b, 1))
            elif what == REPEAT:
                at = self._repeat(a, at)
            elif what == OUTPUTS:
                self._outputs += self._live.pop(a, [])
            elif what == END_OUTPUTS:
                self._release(self._outputs)
                self._outputs.clear()
            elif what == PHASE:
                allocator.begin_phase(self.phases[a])
            elif what == EMPTY:
                allocator.empty_cache()
            elif what == END:
                self._end()
            elif what == LEAVE:
                self._live.pop(a, None)

    def _allocate(self, size: int, count: int, stream: int = 0) -> "list[Block | None]":
        return [self.allocator.allocate(self.sizes[size], stream) for _ in range(count)]

    def _release(self, blocks: "Sequence[Block | None]") -> None:
        for block in blocks:
            self.allocator.release(block)

    def _end(self) -> None:
        for blocks in self._live.values():
            self._release(blocks)
        for by_storage in (self._live, self._spare):
            by_storage.clear()

    def _repeat(self, kinds: int, at: int) -> int:
        """The layers of each kind in turn; the place behind them."""
        layers = []
        for _ in range(kinds):
            _, number, length, *_ = self.program[at : at + WIDTH]
            start, at = at + WIDTH, at + WIDTH + WIDTH * length
            layers.append((number, start, at))
        for turn in range(max(number for number, *_ in layers)):
            for number, start, stop in layers:
                if turn < number:
                    self.events(start, stop)
                    for new, storage in self._handed.items():
                        self._live.setdefault(storage, []).extend(self._own.pop(new))
                    self._handed.clear()
        return at

    def _hand(self, storage: int, new: int, size: int, count: int) -> None:
        """A layer's input goes, which may be the output of a copy or of the layer that it is a copy of; `new` takes its place."""
        place = next((s for s in (storage, self._places.get(storage, new)) if self._live.get(s)), new)
        self._handed[new] = self._places[new] = place
        self._free(place, size, count)

    def _make(self, storage: int, size: int, count: int, *, stream: int) -> None:
        if storage in self._live:
            self._spare.setdefault(self.sizes[size], []).append(storage)
        self._live.setdefault(storage, []).extend(self._allocate(size, count, stream))

    def _free(self, storage: int, size: int, count: int) -> None:
        """Free so many of a storage and its copies, which may stand under another one of their size."""
        for _ in range(count):
            blocks = self._live.get(storage) or self._other(size)
            if blocks:
                self.allocator.release(blocks.pop())

    def _other(self, size: int) -> "list[Block | None]":
        return next((self._live[s] for s in self._spare.get(self.sizes[size], ()) if self._live.get(s)), [])
