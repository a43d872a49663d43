"""Reserved bytes of an analytic estimate: its events, written as a program and replayed through a model of torch's allocator.

A run is loading and two optimizer steps, as in the trace engine: the first step creates the optimizer's states, the second is the
steady one. A script may name other steps (`job.script`). The timeline only counts the layers between the first and the last of a
kind; here each of them repeats the events of the last one.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

from peftplan.allocator import program as events
from peftplan.allocator.program import Program, Replayed, replay
from peftplan.analytic.compiled import Compiled, Steps, Written
from peftplan.analytic.generation import Generation
from peftplan.depth.copies import Layers
from peftplan.dtypes import ITEMSIZE
from peftplan.job.script import NO_SCRIPT, Script
from peftplan.ledger import Line
from peftplan.memory.load import Memory
from peftplan.memory.timeline import Timeline

_LAYER = re.compile(r"(?<=\.)(\d+|\{\})(?=\.)")
"""The layer's place in a name: `{}` for all layers, or the number of the only layer that has the tensor."""

SOURCE = "modelled: replay of the analytic events through a model of torch's CUDA caching allocator, default options"


class Run(NamedTuple):
    """The steps of a run after loading. The last one is reported."""

    steps: Steps
    script: Script = NO_SCRIPT
    generation: Generation | None = None
    """What the policy writes before each step."""

    def fits(self, capacity_bytes: int) -> bool:
        """Whether it runs if the allocator may reserve at most `capacity_bytes`. It releases cached segments before it fails."""
        ways = (False, True) if self.steps[-1][0].load_if_full is not None else (False,)
        for when_full in ways:
            try:
                self.peaks(capacity_bytes=capacity_bytes, when_full=when_full)
            except MemoryError:
                continue
            return True
        return False

    def peaks(self, *, capacity_bytes: int | None = None, when_full: bool = False) -> Replayed:
        """Allocated bytes of each phase, tails of blocks included, and reserved bytes. `when_full`: loaded as a full card is.

        Raises MemoryError if `capacity_bytes` are not enough.
        """
        program, sizes = self.program(when_full=when_full)
        ties, expandable = self.script.ties_by_address, self.steps[-1][0].expandable
        return replay(program, sizes, ties_by_address=ties, expandable=expandable, capacity=capacity_bytes)

    def program(self, *, when_full: bool = False) -> tuple[Program, list[int]]:
        """The events and the table of sizes. All sizes that run the same operations share the events."""
        compiled, _ = self.steps[-1]
        key = (when_full, id(self.generation), *(id(of_step) for of_step, _ in self.steps))
        if key not in compiled.programs:
            load = compiled.load_if_full if when_full and compiled.load_if_full is not None else compiled.load
            compiled.programs[key] = _write([of_step for of_step, _ in self.steps], self.script, load, self.generation)
        written = compiled.programs[key]
        of_step = {id(step): step[0].timeline.requested(step[1]) for step in self.steps}  # most runs repeat one step
        generated = [] if self.generation is None else self.generation.timeline.requested(self.generation.sizes)
        return written.program, generated + [n for step in self.steps for n in of_step[id(step)]] + written.sizes


def _write(steps: list[Compiled], script: Script, load: Callable[[Memory[Any]], None], generation: Generation | None) -> Written:
    generated = 0 if generation is None else len(generation.timeline.kinds)
    compiled = steps[-1]
    num_kinds = generated + sum(len(of_step.timeline.kinds) for of_step in steps)
    writer = _Writer(script, num_kinds, empties=compiled.empties_cache)
    writer.begin("load")
    load(writer)
    writer.take(compiled.early)
    writer.take(line for line in compiled.standing if line.category == "communication" and line not in compiled.built)
    writer.begin("warmup")
    if compiled.first_run is not None:
        compiled.first_run(writer)
    there = (*compiled.early, *compiled.built)
    states = [line for line in compiled.standing if line.category == "optimizer_states" and line not in there]
    makes_gradients = any(_makes_gradients(compiled.timeline, at) for at in range(compiled.timeline.windows[0][1]))
    kinds = generated
    for number, of_step in enumerate(steps, start=1):
        if generation is not None:
            writer.step(generation.timeline, 0, {}, phases=number == len(steps))
            writer.end()
        lasting = _lasting(states, of_step) if number == 1 else {}
        writer.step(of_step.timeline, kinds, lasting, phases=number == len(steps))
        if makes_gradients:
            writer.leave(n for n, kind in enumerate(of_step.timeline.kind_of) if _is_gradient(of_step.timeline, kind))
        writer.end()
        kinds += len(of_step.timeline.kinds)
    return Written(writer.program(), list(writer.sizes), steps, generation)


def _lasting(states: list[Line], compiled: Compiled) -> dict[int, list[Line]]:
    """What the first step allocates for good: optimizer states and workspaces, by the event that they precede."""
    by_event = _by_group(states, compiled.timeline.states)
    for at, line in compiled.workspaces:
        by_event.setdefault(at, []).append(line)
    return by_event


def _by_group(states: list[Line], at: tuple[int, ...]) -> dict[int, list[Line]]:
    """Event → the states that are made before it: those of each group of parameters, which have as many each."""
    each = len(states) // max(len(at), 1)
    if len(set(at)) < 2 or each * len(at) != len(states):
        return dict.fromkeys(at[:1], states)
    return {place: states[number * each : (number + 1) * each] for number, place in enumerate(at)}


def _is_gradient(timeline: Timeline, kind: int) -> bool:
    return timeline.kinds[kind].category == "gradients"


def _makes_gradients(timeline: Timeline, at: int) -> bool:
    kind, count = timeline.events[at]
    return count > 0 and _is_gradient(timeline, kind)


def _stack(name: str) -> str:
    """The part of a name before the layer's number; all of it if it has none."""
    return _LAYER.split(name, maxsplit=1)[0]


def _layers(name: str, copies: int) -> range:
    """The numbers of the layers that have a tensor."""
    number = _LAYER.search(name)
    first = int(number[0]) if number and number[0] != "{}" else 0
    return range(first, first + copies)


class _Writer:
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
        self._storages = 0
        self._streams = 1
        self._phases: list[str] = []
        self._alive: dict[int, int] = {}
        """Storage of a step → how many of it are alive, in order of allocation."""
        self._latest: dict[int, tuple[int, int]] = {}
        """Stack → the last storage made in it since copied layers, and where in the events."""
        self._stacked: dict[int, int] = {}
        """A hidden state that a copied layer leaves alive → the first of its kind. All share one stack under that number."""

    def program(self) -> Program:
        """What has been written."""
        return Program(array("q", self._events).tobytes(), self._storages + 1, self._handles, tuple(self._phases), self._streams)

    # -- loading: `memory.load.Memory` -------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        """Allocate a tensor and return the handle that frees it."""
        handle, sizes = self._handles, self.sizes
        self._events += (events.HOLD, handle, self._num_kinds + sizes.setdefault(nbytes, len(sizes)), 0, 0)
        self._handles = handle + 1
        return handle

    def keep(self, sizes: tuple[int, ...], /) -> None:
        """Allocate tensors for good."""
        if sizes not in self._kept:
            self._kept[sizes] = [n for nbytes in sizes for n in (events.TAKE, self._size(nbytes), 1, 0, 0)]
        self._events += self._kept[sizes]

    def release(self, storage: int, /) -> None:
        """Free a tensor."""
        self._events += (events.LET_GO, storage, 0, 0, 0)

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
        for _, group in groupby(lines, key=lambda line: _stack(line.name)):
            of_stack = [(_layers(line.name, line.copies), self._size(ITEMSIZE[line.dtype] * prod(line.shape))) for line in group]
            for layer in range(max(layers.stop for layers, _ in of_stack)):
                for layers, size in of_stack:
                    if layer in layers:
                        self._events += (events.TAKE, size, 1, 0, 0)

    def step(self, timeline: Timeline, kinds: int, lasting: Mapping[int, Sequence[Line]], *, phases: bool) -> None:
        """Write one optimizer step. `kinds`: where its kinds start in the table. `lasting`: event → what is allocated before it.

        `phases`: whether its phases are reported.
        """
        borders = {start: phase for phase, start, _ in timeline.windows}
        layers = {repeated.first: repeated for repeated in timeline.repeated}
        backward = next((start for phase, start, _ in timeline.windows if phase == "backward"), 0)
        outlives = len(timeline.events) if not self.script.outputs_outlive_step else timeline.windows[-1][1]
        self._storages = max(self._storages, len(timeline.kind_of))
        covered = 0
        empties = {end for phase, _, end in timeline.windows if phase == "backward" and self._empties}
        for at, ((kind, count), storage) in enumerate(zip(timeline.events, timeline.storages, strict=True)):
            if at in empties:
                self.empty_cache()
            if at in borders:
                self._begin(borders[at], counts=phases)
            if at in lasting:
                self.take(lasting[at])
            if at in layers:
                self._repeat(layers[at].layers, timeline, kinds)
                covered = layers[at].last
            if at < covered or (
                at < timeline.windows[0][1] and _makes_gradients(timeline, at)
            ):  # they exist since the first step
                continue
            if count > 1 and at >= timeline.windows[-1][1]:
                covered = self._by_layer(timeline, kinds, at)
            elif count > 0:
                self._alive[storage] = self._alive.pop(storage, 0) + count
                stream = timeline.streams.get(storage, 0)
                self._streams = max(self._streams, stream + 1)
                stack = self._stacked.get(storage, storage)
                self._latest[stack] = (storage, len(self._events))
                self._events += (events.MAKE, stack, kinds + kind, 1, stream)
                if count > 1:  # in two events, so that copied layers can free of these too
                    self._events += (events.MAKE, stack, kinds + kind, count - 1, 0)
            elif at < outlives or timeline.kinds[kind].category == "temporaries":
                self._alive[storage] = self._alive.get(storage, 0) + count
                stack = self._stacked.get(storage, storage)
                latest, since = self._latest.get(stack, (storage, 0))
                if at < backward and latest != storage and self._alive.get(latest, 0) == 1 == -count:
                    self._replace(stack, latest, since, kinds + kind)
                else:
                    self._events += (events.FREE, stack, kinds + kind, -count, 0)
            else:
                self._write(events.OUTPUTS, self._stacked.get(storage, storage))
        if len(timeline.events) in borders:  # the last phase allocates nothing
            self._begin(borders[len(timeline.events)], counts=phases)
        self.take(lasting.get(len(timeline.events), ()))
        if self.script.empties_cache:
            self._write(events.EMPTY)

    def _replace(self, stack: int, latest: int, since: int, size: int) -> None:
        """A layer frees its input once it has made its output, which lies above it in one stack: the output takes its place."""
        output, between = self._events[since : since + events.WIDTH], self._events[since + events.WIDTH :]
        del self._events[since:]
        self._latest = {other: (n, at) for other, (n, at) in self._latest.items() if at < since}
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
        if counts:
            self.begin(phase)
        if phase == "backward":  # the forward has returned
            self._write(events.END_OUTPUTS)

    def _by_layer(self, timeline: Timeline, kinds: int, at: int) -> int:
        """Allocate layer by layer what an optimizer makes for all parameters of a stack. Returns the index of the next event."""
        run = []
        for (kind, count), storage in zip(timeline.events[at:], timeline.storages[at:], strict=True):
            name = timeline.kinds[kind].name
            if count < 1 or _stack(name) != _stack(timeline.kinds[timeline.events[at][0]].name):
                break
            run.append((_layers(name, count), storage, kinds + kind))
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
