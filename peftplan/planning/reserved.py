"""What torch's caching allocator makes of an analytic estimate: its events, replayed through the model of it.

Two optimizer steps after loading, as the trace engine replays them: the first makes the optimizer's states, the second is the
steady one; a script may say other steps (`planning.script`). Layers between the first and the last of their kind allocate what
they keep at one moment, without the temporaries between; so holes are those of two layers of each kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from peftplan.dtypes import ITEMSIZE
from peftplan.memory.allocator.core import Allocator
from peftplan.memory.allocator.stats import Peaks
from peftplan.memory.ledger import Line
from peftplan.memory.timeline import Timeline
from peftplan.planning.script import NO_SCRIPT, Script

if TYPE_CHECKING:
    from peftplan.planning.analytic import Steps


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
        feed = _Feed(Allocator(capacity_bytes=capacity_bytes), self.script)
        feed.allocator.begin_phase("load")
        compiled.load(feed)
        feed.allocator.begin_phase("warmup")
        kept = [line for line in compiled.standing if line.category in ("optimizer_states", "workspaces")]
        for number, (of_step, named) in enumerate(self.steps, start=1):
            feed.step(of_step.timeline, named, states=kept if number == 1 else (), phases=number == len(self.steps))
        return {**feed.allocator.peaks_by_phase, "": feed.allocator.peaks}


class _Feed:
    """Feeds an allocator and names its allocations."""

    def __init__(self, allocator: Allocator, script: Script) -> None:
        self.allocator = allocator
        self.script = script
        self._outputs: list[int] = []
        self._next = 0
        self._live: dict[int, list[int]] = {}
        self._spare: dict[int, list[int]] = {}

    def malloc(self, nbytes: int) -> int:
        """Make a tensor; the number that frees it. Raises MemoryError."""
        self._next += 1
        if self.allocator.malloc(self._next, nbytes) is not None:
            raise MemoryError
        return self._next

    def free(self, number: int) -> None:
        """Free a tensor."""
        self.allocator.free(number)

    def empty_cache(self) -> None:
        """Give back every segment without a live block."""
        self.allocator.empty_cache()

    def take(self, lines: Iterable[Line]) -> None:
        """Allocate lines for good, layer by layer."""
        for _, group in groupby(lines, key=lambda line: line.name.partition("{}")[0]):
            of_stack = [(line, ITEMSIZE[line.dtype] * prod(line.shape)) for line in group]
            for layer in range(max(line.copies for line, _ in of_stack)):
                for line, nbytes in of_stack:
                    if layer < line.copies:
                        self.malloc(nbytes)

    def step(self, timeline: Timeline, named: Mapping[str, int], *, states: Iterable[Line], phases: bool) -> None:
        """One optimizer step; `states` are made in it."""
        nbytes = []
        for made in timeline.kinds:
            size = ITEMSIZE[made.dtype]
            for dim in made.dims:
                size *= dim if isinstance(dim, int) else named[dim]
            nbytes.append(size)
        borders = {start: phase for phase, start, _ in timeline.windows}
        ends = timeline.windows[-1][1]
        for at, ((kind, count), storage) in enumerate(zip(timeline.events, timeline.storages, strict=True)):
            if phases and at in borders:
                self.allocator.begin_phase(borders[at])
            if borders.get(at) == "step":
                self.take(states)
            if borders.get(at) == "backward":  # the forward has returned
                self._drop_outputs()
            if count > 0:
                self._make(storage, nbytes[kind], count)
            elif at < ends or not self.script.outputs_outlive_step or timeline.kinds[kind].category == "temporaries":
                self._free(storage, nbytes[kind], -count)
            else:
                self._outputs += self._live.pop(storage, [])
        if self.script.empties_cache:
            self.allocator.empty_cache()
        for numbers in self._live.values():  # gradients
            for number in numbers:
                self.allocator.free(number)
        self._live.clear()
        self._spare.clear()

    def _drop_outputs(self) -> None:
        for number in self._outputs:
            self.allocator.free(number)
        self._outputs.clear()

    def _make(self, storage: int, nbytes: int, count: int) -> None:
        made = [self.malloc(nbytes) for _ in range(count)]
        if storage in self._live:
            self._spare.setdefault(nbytes, []).append(storage)
            self._live[storage] += made
        else:
            self._live[storage] = made

    def _free(self, storage: int, nbytes: int, count: int) -> None:
        """Free so many of a storage and its copies; a copy of a hidden state may stand under another layer's."""
        for _ in range(count):
            numbers = self._live.get(storage) or self._other(nbytes)
            if numbers:
                self.allocator.free(numbers.pop())

    def _other(self, nbytes: int) -> list[int]:
        return next((self._live[s] for s in self._spare.get(nbytes, ()) if self._live.get(s)), [])
