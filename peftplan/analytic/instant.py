"""The peaks of an analytic estimate. Tensor sums are computed at once; the allocator is replayed when a peak is first read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from peftplan.allocator.program import OPTIONS, Replayed
from peftplan.analytic.compiled import by_processors, last_step, steps_of
from peftplan.analytic.generation import generation_of
from peftplan.analytic.reserved import SOURCE, Run
from peftplan.analytic.running import segments_grow
from peftplan.job.inventory import further_ranks, on_rank
from peftplan.ledger import Ledger
from peftplan.results.estimate import ALL_PHASES, Peaks

if TYPE_CHECKING:
    from peftplan.job.inventory import Inventory


class InstantPeaks(Peaks):
    """Peaks of a job, as data: the job and the sums of its tensors. The replay runs when a property first needs it."""

    def __init__(
        self,
        inventory: Inventory,
        compute_capability: str,
        requested: Mapping[str, int],
        ends: Mapping[str, int],
        assumed: Mapping[str, int],
    ) -> None:
        self.__dict__.update(
            inventory=inventory,
            compute_capability=compute_capability,
            requested=requested,
            ends=ends,
            reserved_source=SOURCE.format(options=OPTIONS[segments_grow(inventory.job.setup)]),
            assumed=assumed,
        )

    inventory: Inventory
    compute_capability: str
    requested: Mapping[str, int]
    """Phase → bytes that the tensors at its peak request, before the allocator rounds them to blocks."""
    ends: Mapping[str, int]
    """Phase of a step → the number of events before its peak."""

    @property
    def _waits(self) -> bool:
        """Whether freed blocks wait for the GPU: FSDP1 calls `record_stream`."""
        distributed = self.inventory.job.distributed
        return distributed is not None and distributed.strategy == "fsdp1"

    def run(self, *, late: bool = False) -> Run:
        """The steps that are replayed. `late`: the GPU is as late as it may be."""
        return self._run_of(self.inventory, late=late)

    def _run_of(self, inventory: Inventory, *, late: bool = False) -> Run:
        steps = steps_of(inventory, self.compute_capability, late=late)
        generation = generation_of(inventory, steps[-1][0], compute_capability=self.compute_capability)
        return Run(steps, inventory.job.script, generation)

    def _other_runs(self) -> Iterator[Run]:
        """Runs that may reserve more: the same with a late GPU, and those of other ranks."""
        if self._waits:
            yield self.run(late=True)
            for rank in further_ranks(self.inventory):
                yield self._run_of(on_rank(self.inventory, rank), late=True)
        if (holding := self.inventory.holding) is not None and holding.ranks:
            for rank in dict.fromkeys(rank for rank in (*holding.ranks, *further_ranks(self.inventory)) if rank != holding.rank):
                yield self._run_of(self.inventory._replace(holding=holding._replace(rank=rank)))

    def runs_within(self, capacity_bytes: int) -> bool:
        """Whether the job runs on every rank if at most `capacity_bytes` can be reserved, however late the GPU is. The allocator
        releases its cache before it fails.
        """
        return all(run.fits(capacity_bytes) for run in self._other_runs()) and (self._waits or self.run().fits(capacity_bytes))

    def may_run_within(self, capacity_bytes: int) -> bool:
        """Whether the job runs there if the GPU is never late, and is not known to run otherwise."""
        return self._waits and self.at_least <= capacity_bytes and self.run().fits(capacity_bytes)

    @property
    def by_processors(self) -> bool:
        """Whether the card's multiprocessors decide a kernel or a buffer; if not, its compute capability alone does."""
        return by_processors(self.inventory, self.compute_capability)

    @cached_property
    def _replayed(self) -> Replayed:
        return self.run().peaks()

    @property
    def at_least(self) -> int:
        compiled, _ = last_step(self.inventory, self.compute_capability)
        decides = (phase for phase in self.requested if phase != "load" or compiled.load_if_full is None)
        return max(self.requested[phase] for phase in decides)

    @property
    def reserved(self) -> int:
        return self._replayed.reserved

    @cached_property
    def reserved_at_most(self) -> int:
        return max([self.reserved, *(run.peaks().reserved for run in self._other_runs())])

    @cached_property
    def by_phase(self) -> dict[str, int]:
        allocated = self._replayed.allocated
        return {phase: max(self.requested[phase], allocated.get(phase, 0)) for phase in ALL_PHASES if phase in self.requested}

    @cached_property
    def ledgers(self) -> Mapping[str, Ledger]:
        return _Ledgers(self)


class _Ledgers(Mapping[str, Ledger]):
    """Phase → the tensors alive at its peak, written when first read. Tails of blocks fill each sum up to the allocated bytes."""

    def __init__(self, peaks: InstantPeaks) -> None:
        self._peaks = peaks
        self._written: dict[str, Ledger] = {}

    def __getitem__(self, phase: str) -> Ledger:
        if phase not in self._written:
            self._written[phase] = self._write(phase).with_tails(self._peaks.by_phase[phase])
        return self._written[phase]

    def _write(self, phase: str) -> Ledger:
        compiled, dims = last_step(self._peaks.inventory, self._peaks.compute_capability)
        if phase == "load":
            return compiled.loading
        if phase == "generate":
            generation = generation_of(self._peaks.inventory, compiled, compute_capability=self._peaks.compute_capability)
            assert generation is not None
            return compiled.standing + generation.lines
        return compiled.standing + Ledger(compiled.timeline.lines(self._peaks.ends[phase], dims))

    def __iter__(self) -> Iterator[str]:
        yield from self._peaks.requested

    def __len__(self) -> int:
        return len(self._peaks.requested)
