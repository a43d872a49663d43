"""Writes the events of a run as a program of the allocator: loading, and optimizer steps in which copied layers are repeated."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from math import prod

from peftplan.allocator import program as events
from peftplan.allocator.program import FREE, MAKE, Program
from peftplan.depth.copies import Layers, layers_of, stack_of
from peftplan.dtypes import ITEMSIZE
from peftplan.job.script import Script
from peftplan.ledger import Line
from peftplan.memory.timed import FLUSHED_BYTES
from peftplan.memory.timeline import Timeline, outputs_kept


def is_gradient(timeline: Timeline, kind: int) -> bool:
    """Whether a tensor of this kind is the gradient of a parameter."""
    return timeline.kinds[kind].category == "gradients"


def makes_gradients(timeline: Timeline, at: int) -> bool:
    """Whether an event makes gradients of parameters."""
    kind, count = timeline.events[at]
    return count > 0 and is_gradient(timeline, kind)


class Writer:
    """Writes a program. In the table of sizes, those of a step's tensors come first, by kind; all others follow."""

    def __init__(self, script: Script, num_kinds: int, *, empties: bool) -> None:
        self.script = script
        self._empties = empties
        self.sizes: dict[int, int] = {}
        self._num_kinds = num_kinds
        self._events: list[int] = []
        self._kept: dict[tuple[int, ...], list[int]] = {}
        """Sizes of tensors that are allocated together for good → their events."""
        self._handles = 0
        self._open: dict[int, None] = {}
        """Handles of what is allocated, in order."""
        self._until_backward: list[int] = []
        """Those that the end of the first forward frees."""
        self.passing: Mapping[int, tuple[int, ...]] = {}
        """Event of the next step before which a kernel is timed → bytes of the copies over which it runs."""
        self._storages = 0
        self._streams = {0: 0}
        """Stream of a timeline → its number among those on which something is made."""
        self._phases: list[str] = []
        self._alive: dict[int, int] = {}
        """Storage of a step → how many of it are alive, in order of allocation."""
        self._latest: dict[int, tuple[int, int]] = {}
        """Stack → the last storage made in it since copied layers, and where in the events."""
        self._stacked: dict[int, int] = {}
        """A hidden state that a copied layer leaves alive → the first of its kind. All share one stack under that number."""
        self._batches: list[int] = []
        """Handles of the batches that the last step collected."""

    def program(self) -> Program:
        """What has been written."""
        return Program(
            array("q", self._events).tobytes(), self._storages + 1, self._handles, tuple(self._phases), len(self._streams)
        )

    # -- loading: `memory.load.Memory` -------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        """Allocate a tensor and return the handle that frees it."""
        handle, sizes = self._handles, self.sizes
        self._events += (events.HOLD, handle, self._num_kinds + sizes.setdefault(nbytes, len(sizes)), 0, 0)
        self._handles = handle + 1
        self._open[handle] = None
        return handle

    def keep(self, sizes: tuple[int, ...], /) -> None:
        """Allocate tensors for good."""
        if sizes not in self._kept:
            self._kept[sizes] = [n for nbytes in sizes for n in (events.TAKE, self._size(nbytes), 1, 0, 0)]
        self._events += self._kept[sizes]

    def release(self, storage: int, /) -> None:
        """Free a tensor."""
        self._events += (events.LET_GO, storage, 0, 0, 0)
        self._open.pop(storage, None)

    def loaded(self) -> None:
        """The model is loaded. What loading has not freed goes when the first forward has returned."""
        self._until_backward = [*self._open]

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache()`."""
        self._write(events.EMPTY)

    # -- steps -------------------------------------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """Count the events that follow for this phase."""
        if phase not in self._phases:
            self._phases.append(phase)
        self._write(events.PHASE, self._phases.index(phase))

    def take(self, lines: Iterable[Line]) -> None:
        """Allocate lines for good, layer by layer."""
        for _, group in groupby(lines, key=lambda line: stack_of(line.name)):
            of_stack = [
                (layers_of(line.name, line.copies), self._size(ITEMSIZE[line.dtype] * prod(line.shape))) for line in group
            ]
            for layer in range(max(layers.stop for layers, _ in of_stack)):
                for layers, size in of_stack:
                    if layer in layers:
                        self._events += (events.TAKE, size, 1, 0, 0)

    def step(
        self, timeline: Timeline, kinds: int, lasting: Mapping[int, Sequence[Line]], *, phases: bool, empties_before: bool = False
    ) -> None:
        """Write one optimizer step. `kinds`: where its kinds start in the table. `lasting`: event → what is allocated before it.

        `phases`: whether its phases are reported. `empties_before`: whether cached segments are given back before each backward.
        """
        borders = {start: phase for phase, start, _ in timeline.windows}
        layers = {repeated.first: repeated for repeated in timeline.repeated}
        backward = next((start for phase, start, _ in timeline.windows if phase == "backward"), 0)
        outlives = len(timeline.events) if not self.script.outputs_outlive_step else timeline.windows[-1][1]
        if handed_on := timeline.handed_on:
            outlives = 0
        self._storages = max(self._storages, len(timeline.kind_of))
        self._collect(timeline, kinds)
        first, last_phase = timeline.windows[0][1], timeline.windows[-1][1]
        empties = {end for phase, _, end in timeline.windows if phase == "backward" and self._empties}.union(timeline.emptied)
        stops = empties.union(borders, lasting, self.passing, layers, timeline.passed)
        ends = sorted({0, *(at for at in stops if at < len(timeline.events)), first, last_phase, outlives, len(timeline.events)})
        covered = 0
        for start, end in pairwise(ends):
            if start in stops:
                if start in empties:
                    self.empty_cache()
                if start in borders:
                    self._begin(borders[start], counts=phases)
                    if borders[start] == "backward" and empties_before:
                        self.empty_cache()
                if start in timeline.passed:
                    self._write(events.END_OUTPUTS)
                if start in lasting:
                    self.take(lasting[start])
                if start in self.passing:
                    self._time(self.passing[start])
                if start in layers:
                    self._repeat(layers[start].layers, timeline, kinds)
                    covered = layers[start].last
            if not layers and first <= start and end <= min(last_phase, outlives):
                self._copy(timeline, kinds, start, end)
                continue
            for at in range(start, end):
                if at < covered or (at < first and makes_gradients(timeline, at)):  # they exist since the first step
                    continue
                (kind, count), storage = timeline.events[at], timeline.storages[at]
                if storage in timeline.collected:
                    continue
                if count > 1 and at >= last_phase:
                    covered = self._by_layer(timeline, kinds, at)
                elif (
                    count < 0
                    and at >= outlives
                    and (storage in handed_on if handed_on else outputs_kept(timeline.kinds[kind], count))
                ):
                    self._write(events.OUTPUTS, self._stacked.get(storage, storage))
                elif layers:
                    self._follow(timeline, kinds, at, replaces=at < backward)
                else:
                    self._copy(timeline, kinds, at, at + 1)
        if len(timeline.events) in borders:  # the last phase allocates nothing
            self._begin(borders[len(timeline.events)], counts=phases)
        self.take(lasting.get(len(timeline.events), ()))
        if len(timeline.events) in self.passing:
            self._time(self.passing[len(timeline.events)])
        for phase, _, _ in timeline.counted[len(timeline.windows) :]:
            self._begin(phase, counts=phases)
        if self.script.empties_cache:
            self._write(events.EMPTY)

    def _time(self, copies: tuple[int, ...]) -> None:
        """A kernel runs over copies of what it changes, then beside the buffer that clears the card's cache."""
        for beside in ((), (FLUSHED_BYTES,)):
            for handle in [self.allocate(nbytes) for nbytes in (*beside, *copies)]:
                self.release(handle)

    def _copy(self, timeline: Timeline, kinds: int, start: int, end: int) -> None:
        """Write events as they are, where no layer is copied."""
        write, collected, streams = self._events.extend, timeline.collected, timeline.streams
        for (kind, count), storage in zip(timeline.events[start:end], timeline.storages[start:end], strict=True):
            if storage in collected:
                continue
            if count <= 0:  # 0: what lies on the host
                write((FREE, storage, kinds + kind, -count, 0))
                continue
            stream = self._streams.setdefault(streams[storage], len(self._streams)) if storage in streams else 0
            write((MAKE, storage, kinds + kind, 1, stream))
            if count > 1:
                write((MAKE, storage, kinds + kind, count - 1, 0))

    def _follow(self, timeline: Timeline, kinds: int, at: int, *, replaces: bool) -> None:
        """Write an event between copied layers. `replaces`: what is freed may have its successor in its place."""
        (kind, count), storage = timeline.events[at], timeline.storages[at]
        alive, written = self._alive, self._events
        if count > 0:
            alive[storage] = alive.pop(storage, 0) + count
            stack = self._stacked.get(storage, storage)
            self._latest[stack] = (storage, len(written))
            streams = timeline.streams
            stream = self._streams.setdefault(streams[storage], len(self._streams)) if storage in streams else 0
            written += (MAKE, stack, kinds + kind, 1, stream)
            if count > 1:  # in two events, so that copied layers can free of these too
                written += (MAKE, stack, kinds + kind, count - 1, 0)
            return
        alive[storage] = alive.get(storage, 0) + count
        stack = self._stacked.get(storage, storage)
        newest, since = self._latest.get(stack, (storage, 0))
        if replaces and newest != storage and alive.get(newest, 0) == 1 == -count:
            self._replace(stack, newest, since, kinds + kind)
        else:
            written += (FREE, stack, kinds + kind, -count, 0)

    def _collect(self, timeline: Timeline, kinds: int) -> None:
        """Allocate a step's batches, then free those of the step before."""
        before, self._batches = self._batches, []
        first = timeline.windows[0][1]
        for (kind, count), storage in zip(timeline.events[:first], timeline.storages, strict=False):
            for _ in range(count if storage in timeline.collected else 0):
                self._batches.append(self._handles)
                self._events += (events.HOLD, self._handles, kinds + kind, 0, 0)
                self._handles += 1
        for handle in before:
            self.release(handle)

    def _replace(self, stack: int, latest: int, since: int, size: int) -> None:
        """A layer frees its input once it has made its output, which lies above it in one stack: the output takes its place."""
        output, between = self._events[since : since + events.WIDTH], self._events[since + events.WIDTH :]
        del self._events[since:]
        for other in [other for other, (_, at) in self._latest.items() if at >= since]:
            del self._latest[other]
        self._write(events.REPEAT, 1)
        self._write(events.LAYER, 1, len(between) // events.WIDTH + 2)
        self._events += (events.OWN, latest, output[2], 1, 0, *between, events.HAND, stack, latest, size, 1)

    def leave(self, storages: Iterable[int]) -> None:
        """Keep what is alive of these storages for good."""
        for storage in storages:
            self._write(events.LEAVE, storage)

    def end(self) -> None:
        """End a step."""
        self._write(events.END)
        self._alive.clear()
        self._stacked.clear()
        self._latest.clear()

    def _begin(self, phase: str, *, counts: bool) -> None:
        if phase == "backward":  # the forward has returned
            self._write(events.END_OUTPUTS)
            while self._until_backward:
                self.release(self._until_backward.pop(0))
        if counts:
            self.begin(phase)

    def _by_layer(self, timeline: Timeline, kinds: int, at: int) -> int:
        """Allocate layer by layer what an optimizer makes for all parameters of a stack. Returns the index of the next event."""
        run = []
        for (kind, count), storage in zip(timeline.events[at:], timeline.storages[at:], strict=True):
            name = timeline.kinds[kind].name
            if count < 1 or stack_of(name) != stack_of(timeline.kinds[timeline.events[at][0]].name):
                break
            run.append((layers_of(name, count), storage, kinds + kind))
        for layer in range(max(layers.stop for layers, *_ in run)):
            for layers, storage, size in run:
                if layer in layers:
                    self._write(events.ADD, storage, size)
        return at + len(run)

    def _repeat(self, layers: Sequence[Layers], timeline: Timeline, kinds: int) -> None:
        """Write the layers that the timeline only counts, in the order in which they run."""
        handed_on = {after: before for layer in layers for after, before in layer.handed_on.items()}
        for after, before in sorted(handed_on.items()):
            if before not in self._stacked and self._alive.get(before, 0) <= 0:  # these copies run before the layer they copy
                in_its_place = self._alike(before, timeline)
                self._stacked[before] = self._stacked.get(in_its_place, in_its_place)
            self._stacked[after] = self._stacked.get(before, before)
        there = {n for layer in layers for n in layer.log if n > 0} | {n for n, count in self._alive.items() if count > 0}
        of_kind = []
        for layer in layers:
            replaced = [n for n, place in layer.moved.items() if n not in there and self._alive.get(place, 0) <= 0]
            handed_on = {n: self._alike(n, timeline) for n in replaced}
            of_kind.append(_events_of(layer, timeline, kinds, handed_on, self._stacked))
        order = [kind for _, kind in sorted((turn, kind) for kind, layer in enumerate(layers) for turn in layer.turns)]
        self._latest.clear()
        period = period_of(order)
        self._write(events.REPEAT, period)
        for place, kind in enumerate(order[:period]):
            self._write(events.LAYER, len(order[place::period]), len(of_kind[kind]) // events.WIDTH)
            self._events += of_kind[kind]

    def _alike(self, storage: int, timeline: Timeline) -> int:
        """The latest living tensor with the dims and dtype of `storage`: what the preceding layer, of another kind, handed on."""
        of_storage = timeline.kinds[timeline.kind_of[storage]]
        for n in reversed(self._alive):
            kind = timeline.kinds[timeline.kind_of[n]]
            if self._alive[n] > 0 and (kind.dims, kind.dtype) == (of_storage.dims, of_storage.dtype):
                return n
        return storage

    def _size(self, nbytes: int) -> int:
        return self._num_kinds + self.sizes.setdefault(nbytes, len(self.sizes))

    def _write(self, what: int, a: int = 0, b: int = 0) -> None:
        self._events += (what, a, b, 0, 0)


def period_of(order: Sequence[int]) -> int:
    """The period of the layers' kinds: 3 for 0 0 1 0 0 1 0."""
    return next(n for n in range(1, len(order) + 1) if order[n:] == order[: len(order) - n])


def _events_of(
    layers: Layers, timeline: Timeline, kinds: int, handed_on: Mapping[int, int], stacked: Mapping[int, int]
) -> list[int]:
    """The events of one layer: tensors that it allocates and frees, keeps, frees of other layers, or replaces.

    `handed_on`: a storage that does not exist yet where the copies run → the one that takes its place.
    `stacked`: a hidden state → the storage under whose number it is kept.
    """
    net, allocated = frozenset(layers.net), {n for n in layers.log if n > 0}
    written: list[int] = []
    for n in layers.log:
        storage = abs(n)
        size, count = kinds + timeline.kind_of[storage], timeline.tensors.get(storage, 1)
        if n in net:
            written += (events.MAKE if n > 0 else events.FREE, stacked.get(storage, storage), size, count, 0)
        elif n > 0:
            written += (events.OWN, storage, size, count, 0)
        elif storage in allocated:
            written += (events.END_OWN, storage, 0, 0, 0)
        elif storage in layers.moved:
            alike = handed_on.get(storage, storage)
            written += (events.HAND, stacked.get(alike, alike), layers.moved[storage], size, count)
    return written
