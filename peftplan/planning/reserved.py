"""What torch's caching allocator makes of an analytic estimate: its events, replayed through the model of it.

Two optimizer steps after loading, as the trace engine replays them: the first makes the optimizer's states, the second is the
steady one; a script may say other steps (`planning.script`). Layers between the first and the last of their kind, which the
timeline only counts, do here what the last one does, event by event.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from peftplan.dtypes import ITEMSIZE
from peftplan.memory.allocator.blocks import Block
from peftplan.memory.allocator.config import AllocatorConfig
from peftplan.memory.allocator.core import Allocator
from peftplan.memory.allocator.stats import Peaks
from peftplan.memory.copies import Layers
from peftplan.memory.ledger import Line
from peftplan.memory.timeline import Kind, Timeline
from peftplan.planning.script import NO_SCRIPT, Script

if TYPE_CHECKING:
    from peftplan.planning.analytic import Compiled, Steps


_LAYER = re.compile(r"(?<=\.)(\d+|\{\})(?=\.)")
"""The place of a layer's number in a name, or the number of the only one that has the tensor."""

SOURCE = "modelled: replay of the analytic events through a model of torch's CUDA caching allocator, default options"


class Run(NamedTuple):
    """The steps of a run after loading; the last one counts."""

    steps: Steps
    script: Script = NO_SCRIPT

    def fits(self, capacity_bytes: int) -> bool:
        """Whether it runs where the allocator can take so many bytes: it gives cached segments back before it fails."""
        try:
            self.peaks(capacity_bytes=capacity_bytes)
        except MemoryError:
            return False
        return True

    def peaks(self, *, capacity_bytes: int | None = None) -> dict[str, Peaks]:
        """Allocated bytes with the tails of blocks, and reserved bytes: phase → peaks, and `` for the whole run.

        Raises MemoryError where `capacity_bytes` are not enough.
        """
        compiled, _ = self.steps[-1]
        feed = _Feed(Allocator(AllocatorConfig(ties_by_address=self.script.ties_by_address), capacity_bytes), self.script)
        feed.allocator.begin_phase("load")
        compiled.load(feed.allocator)
        feed.take(compiled.early)
        feed.allocator.begin_phase("warmup")
        states = [line for line in compiled.standing if line.category == "optimizer_states" and line not in compiled.early]
        for number, (of_step, named) in enumerate(self.steps, start=1):
            made = _made(states, of_step) if number == 1 else {}
            feed.step(of_step.timeline, named, made, phases=number == len(self.steps))
        return {**feed.allocator.peaks_by_phase, "": feed.allocator.peaks}


def _made(states: list[Line], compiled: Compiled) -> dict[int, list[Line]]:
    """What the first step makes for all: the optimizer's states and workspaces, by the event that they precede."""
    found = {compiled.timeline.states: states}
    for at, line in compiled.workspaces:
        found.setdefault(at, []).append(line)
    return found


def _stack(name: str) -> str:
    """What precedes the number of a layer in a name, or the name."""
    return _LAYER.split(name, maxsplit=1)[0]


def _layers(name: str, copies: int) -> range:
    """The layers of a stack that have a tensor."""
    found = _LAYER.search(name)
    first = int(found[0]) if found and found[0] != "{}" else 0
    return range(first, first + copies)


class _Feed:
    """Feeds an allocator; holds its blocks by the storage of the tape that they are for."""

    def __init__(self, allocator: Allocator, script: Script) -> None:
        self.allocator = allocator
        self.script = script
        self._outputs: list[Block | None] = []
        self._live: dict[int, list[Block | None]] = {}
        self._spare: dict[int, list[int]] = {}
        self._places: dict[int, int] = {}
        """What a copied layer hands on → the storage in whose place it stands."""
        self._heirs: dict[int, int] = {}
        """The hidden state before copied layers → the one behind them, of which all copies go before it in backward."""

    def take(self, lines: Iterable[Line]) -> None:
        """Allocate lines for good, layer by layer."""
        for _, group in groupby(lines, key=lambda line: _stack(line.name)):
            of_stack = [(_layers(line.name, line.copies), ITEMSIZE[line.dtype] * prod(line.shape)) for line in group]
            for layer in range(max(layers.stop for layers, _ in of_stack)):
                for layers, nbytes in of_stack:
                    if layer in layers:
                        self.allocator.allocate(nbytes)

    def step(self, timeline: Timeline, named: Mapping[str, int], made: Mapping[int, Sequence[Line]], *, phases: bool) -> None:
        """One optimizer step; `made`: what lasts, by the event that it precedes."""
        nbytes = [_bytes(kind, named) for kind in timeline.kinds]
        borders = {start: phase for phase, start, _ in timeline.windows}
        layers = {repeated.first: repeated for repeated in timeline.repeated}
        outlives = len(timeline.events) if not self.script.outputs_outlive_step else timeline.windows[-1][1]
        done = 0
        for at, ((kind, count), storage) in enumerate(zip(timeline.events, timeline.storages, strict=True)):
            if at in borders:
                self._begin(borders[at], counts=phases)
            if at in made:
                self.take(made[at])
            if at in layers:
                self._repeat([_Layer.of(each, timeline, nbytes) for each in layers[at].layers])
                done = layers[at].last
            if at < done:
                continue
            if count > 1 and at >= timeline.windows[-1][1]:
                done = self._by_layer(timeline, nbytes, at)
            elif count > 0:
                self._make(storage, nbytes[kind], count)
            elif at < outlives or timeline.kinds[kind].category == "temporaries":
                self._free(storage, nbytes[kind], -count)
            else:
                self._outputs += self._live.pop(storage, [])
        self.take(made.get(len(timeline.events), ()))
        if self.script.empties_cache:
            self.allocator.empty_cache()
        for blocks in self._live.values():  # gradients
            self._give_back(blocks)
        self._live.clear()
        self._spare.clear()
        self._heirs.clear()

    def _begin(self, phase: str, *, counts: bool) -> None:
        if counts:
            self.allocator.begin_phase(phase)
        if phase == "backward":  # the forward has returned
            self._give_back(self._outputs)
            self._outputs.clear()

    def _by_layer(self, timeline: Timeline, nbytes: Sequence[int], at: int) -> int:
        """Make what an optimizer makes for all parameters of a stack, layer by layer; the event behind."""
        run = []
        for (kind, count), storage in zip(timeline.events[at:], timeline.storages[at:], strict=True):
            name = timeline.kinds[kind].name
            if count < 1 or _stack(name) != _stack(timeline.kinds[timeline.events[at][0]].name):
                break
            run.append((_layers(name, count), storage, nbytes[kind]))
        for layer in range(max(layers.stop for layers, *_ in run)):
            for layers, storage, size in run:
                if layer in layers:
                    self._live.setdefault(storage, []).append(self.allocator.allocate(size))
        return at + len(run)

    def _repeat(self, layers: list[_Layer]) -> None:
        """Layers that the timeline only counts, those of several kinds in turn."""
        given = {made: before for layer in layers for made, before in layer.given.items()}
        before, behind = set(given.values()) - set(given), set(given) - set(given.values())
        self._heirs |= zip(sorted(before), sorted(behind), strict=False)  # one each, but where nothing is handed on
        for turn in range(max(layer.number for layer in layers)):
            for layer in layers:
                if turn < layer.number:
                    self._run(layer)

    def _run(self, layer: _Layer) -> None:
        """What one layer does. Its input may be the output of a copy, or of the layer that it is a copy of."""
        allocate, release = self.allocator.allocate, self.allocator.release
        own: dict[int, list[Block | None]] = {}
        handed: dict[int, int] = {}
        for what, storage, size, count in layer.events:
            if what == "make":
                own[storage] = [allocate(size) for _ in range(count)]
            elif what == "free":
                for block in own.pop(storage):
                    release(block)
            elif what == "keep":
                self._make(storage, size, count)
            elif what == "drop":
                self._free(storage, size, count)
            else:
                new = layer.moved[storage]
                handed[new] = next((s for s in (storage, self._places.get(storage, new)) if self._live.get(s)), new)
                self._places[new] = handed[new]
                self._free(handed[new], size, count)
        for new, storage in handed.items():
            self._live.setdefault(storage, []).extend(own.pop(new))

    def _give_back(self, blocks: Iterable[Block | None]) -> None:
        for block in blocks:
            self.allocator.release(block)

    def _make(self, storage: int, nbytes: int, count: int) -> None:
        made = [self.allocator.allocate(nbytes) for _ in range(count)]
        if storage in self._live:
            self._spare.setdefault(nbytes, []).append(storage)
            self._live[storage] += made
        else:
            self._live[storage] = made

    def _free(self, storage: int, nbytes: int, count: int) -> None:
        """Free so many of a storage and its copies; a copy of a hidden state may stand under another layer's."""
        for _ in range(count):
            blocks = self._live.get(self._heirs.get(storage, storage)) or self._live.get(storage) or self._other(nbytes)
            if blocks:
                self.allocator.release(blocks.pop())

    def _other(self, nbytes: int) -> list[Block | None]:
        return next((self._live[s] for s in self._spare.get(nbytes, ()) if self._live.get(s)), [])


What = Literal["make", "free", "keep", "drop", "hand"]


class _Layer(NamedTuple):
    """`Layers` with sizes: what a layer makes and frees itself, what it keeps, drops of others, or puts in another's place."""

    number: int
    events: tuple[tuple[What, int, int, int], ...]
    moved: Mapping[int, int]
    given: Mapping[int, int]

    @classmethod
    def of(cls, layers: Layers, timeline: Timeline, nbytes: Sequence[int]) -> _Layer:
        """The events of one layer: what, storage, bytes, how many."""
        net, made = frozenset(layers.net), {n for n in layers.log if n > 0}
        events: list[tuple[What, int, int, int]] = []
        for n in layers.log:
            storage = abs(n)
            what: What | None
            if n > 0:
                what = "keep" if n in net else "make"
            else:
                what = "drop" if n in net else "free" if storage in made else "hand" if storage in layers.moved else None
            if what is not None:
                events.append((what, storage, nbytes[timeline.kind_of[storage]], timeline.tensors.get(storage, 1)))
        return cls(layers.number, tuple(events), layers.moved, layers.given)


def _bytes(kind: Kind, named: Mapping[str, int]) -> int:
    """Bytes of a tensor as asked for, before rounding."""
    return ITEMSIZE[kind.dtype] * prod(named[dim] if isinstance(dim, str) else dim for dim in kind.dims)
