"""Reserved bytes of an analytic estimate: its events, replayed through the model of torch's caching allocator.

Two optimizer steps after loading, as the trace engine replays them: the first makes the optimizer's states, the second is the
steady one; a script may say other steps (`planning.script`). Layers between the first and the last of their kind allocate what
they keep at one moment, without the temporaries between; so holes are those of two layers of each kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from peftplan.dtypes import ITEMSIZE
from peftplan.memory.allocator.core import Allocator
from peftplan.memory.allocator.stats import Peaks
from peftplan.memory.ledger import Line
from peftplan.memory.timeline import Timeline
from peftplan.planning.script import NO_SCRIPT, Script

if TYPE_CHECKING:
    from peftplan.planning.analytic import Steps


def runs_within(steps: Steps, script: Script, capacity_bytes: int) -> bool:
    """Whether the steps run where the allocator can take so many bytes: it gives cached segments back before it fails."""
    try:
        replayed(steps, script, capacity_bytes=capacity_bytes)
    except MemoryError:
        return False
    return True


def replayed(steps: Steps, script: Script = NO_SCRIPT, *, capacity_bytes: int | None = None) -> dict[str, Peaks]:
    """Allocated bytes with the tails of blocks, and reserved bytes: phase → peaks, and `` for the whole run.

    Raises MemoryError where `capacity_bytes` are not enough.
    """
    compiled, _ = steps[-1]
    run = _Run(Allocator(capacity_bytes=capacity_bytes), script)
    run.allocator.begin_phase("load")
    run.take(line for line in compiled.loading if line.copies)
    run.allocator.begin_phase("warmup")
    kept = [line for line in compiled.standing if line.category in ("optimizer_states", "workspaces")]
    for number, (of_step, named) in enumerate(steps, start=1):
        run.step(of_step.timeline, named, states=kept if number == 1 else (), phases=number == len(steps))
    return {**run.allocator.peaks_by_phase, "": run.allocator.peaks}


class _Run:
    """Feeds an allocator and names its allocations."""

    def __init__(self, allocator: Allocator, script: Script) -> None:
        self.allocator = allocator
        self.script = script
        self._outputs: list[int] = []
        self._next = 0
        self._live: dict[int, list[int]] = {}
        self._spare: dict[int, list[int]] = {}

    def _malloc(self, nbytes: int) -> int:
        self._next += 1
        if self.allocator.malloc(self._next, nbytes) is not None:
            raise MemoryError
        return self._next

    def take(self, lines: Iterable[Line]) -> None:
        """Allocate lines for good; what loading takes in passing is freed again."""
        passing = []
        for line in lines:
            nbytes = ITEMSIZE[line.dtype]
            for dim in line.shape:
                nbytes *= dim
            made = [self._malloc(nbytes) for _ in range(line.copies)]
            passing += made if line.category == "temporaries" else []
        for number in passing:
            self.allocator.free(number)

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
        made = [self._malloc(nbytes) for _ in range(count)]
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
