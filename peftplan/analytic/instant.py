"""The peaks of an analytic estimate. Tensor sums are computed at once; the allocator is replayed when a peak is first read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from peftplan.allocator.program import OPTIONS, Replayed
from peftplan.analytic.compile_job import Compiled
from peftplan.analytic.compiled import by_processors, last_step, steps_of
from peftplan.analytic.reserved import SOURCE, Run
from peftplan.analytic.running import segments_grow
from peftplan.analytic.unreserved import MARGIN, beside_replay, unreserved
from peftplan.ledger import Ledger
from peftplan.results.peaks import ALL_PHASES, Peaks

if TYPE_CHECKING:
    from peftplan.analytic.generation import Generation
    from peftplan.job.inventory import Inventory

Moments = tuple[Mapping[str, tuple[int, int]], Mapping[str, int]]
"""Phase → (bytes at its peak, how many events lead to it); and what is assumed besides the setup."""
Known = dict[int, tuple[Compiled, Moments]]
"""The moments of compiled steps at one job's sizes, by the id of the timeline."""


class InstantPeaks(Peaks):
    """Peaks of one GPU, as data: its job and the sums of its tensors. The replay runs when a property first needs it."""

    def __init__(
        self,
        inventory: Inventory,
        compute_capability: str,
        requested: Mapping[str, int],
        ends: Mapping[str, int],
        assumed: Mapping[str, object],
    ) -> None:
        self.__dict__.update(
            inventory=inventory,
            compute_capability=compute_capability,
            requested=requested,
            ends=ends,
            assumed=assumed,
        )

    inventory: Inventory
    compute_capability: str
    requested: Mapping[str, int]
    """Phase → bytes that the tensors at its peak request, before the allocator rounds them to blocks."""
    ends: Mapping[str, int]
    """Phase of a step → the number of events before its peak."""

    @property
    def incomplete(self) -> tuple[str, ...]:
        """An evaluation without a formula."""
        if self.inventory.job.setup.eval_batch_size is None:
            return ()
        from peftplan.job.evaluating import not_counted

        return not_counted(self.inventory.job)

    @cached_property
    def unreserved(self) -> str | None:
        largest = max(self.requested, key=self.requested.__getitem__)
        return unreserved(self.inventory.job, largest, self.compute_capability)

    @property
    def reserved_source(self) -> str | None:
        if self.unreserved is not None:
            return None
        return SOURCE.format(options=OPTIONS[segments_grow(self.inventory.job.setup)])

    @property
    def largest(self) -> InstantPeaks:
        """Those of the GPU where the allocator counts most."""
        return self

    def run(self, *, late: bool = False) -> Run:
        """The steps that are replayed. `late`: the GPU is as late as it may be."""
        steps = steps_of(self.inventory, self.compute_capability, late=late)
        generations = _generations(self.inventory, steps[-1][0], self.compute_capability)
        evaluations = _evaluations(self.inventory, self.compute_capability)
        return Run(steps, self.inventory.job.script, generations, evaluations)

    def runs_within(self, capacity_bytes: int) -> bool:
        """Whether the job runs on every rank if at most `capacity_bytes` can be reserved, however late the GPU is. The allocator
        releases its cache before it fails.
        """
        return self.run().fits(capacity_bytes)

    @property
    def by_processors(self) -> bool:
        """Whether the card's multiprocessors decide a kernel or a buffer; if not, its compute capability alone does."""
        return by_processors(self.inventory, self.compute_capability)

    @cached_property
    def replayed(self) -> Replayed:
        """What the replay of its steps allocates and reserves."""
        return self.run().peaks()

    @property
    def at_least(self) -> int:
        compiled, _ = last_step(self.inventory, self.compute_capability)
        decides = (phase for phase in self.requested if phase != "load" or compiled.load_if_full is None)
        return max(self.requested[phase] for phase in decides)

    @property
    def replayed_reserved(self) -> int:
        """What the replay reserves, which is not what the job reserves where `unreserved` says so."""
        return self.replayed.reserved

    @property
    def reserved(self) -> int | None:
        return self.replayed_reserved if self.unreserved is None else None

    @property
    def replayed_at_most(self) -> int:
        """The same of the GPU of which the replay reserves most."""
        return self.replayed_reserved

    @property
    def reserved_with_care(self) -> int | None:
        if self.unreserved is None:
            return None
        return int(MARGIN * self.replayed_at_most) + beside_replay(self.inventory.job, self.compute_capability)

    @property
    def reserved_at_most(self) -> int | None:
        return self.replayed_at_most if self.unreserved is None else None

    @cached_property
    def by_phase(self) -> dict[str, int]:
        allocated = self.replayed.allocated
        return {phase: max(self.requested[phase], allocated.get(phase, 0)) for phase in ALL_PHASES if phase in self.requested}

    @cached_property
    def ledgers(self) -> Mapping[str, Ledger]:
        return _Ledgers(self)


def peaks_of_one(inventory: Inventory, compute_capability: str, known: Known) -> InstantPeaks:
    """The peaks of one GPU. `known`: those of steps that need as much."""
    compiled_job, dims = last_step(inventory, compute_capability)
    timeline = (compiled_job.like or compiled_job).timeline
    if id(timeline) not in known:
        peaks = compiled_job.timeline.peaks(dims, compiled_job.standing_bytes)
        known[id(timeline)] = compiled_job, (peaks, compiled_job.assumed(dims))
    of, (moments, assumed) = known[id(timeline)]
    more = compiled_job.standing_bytes - of.standing_bytes
    requested = {"load": compiled_job.loading_bytes, **{phase: more + nbytes for phase, (nbytes, _) in moments.items()}}
    beside = (*_generations(inventory, compiled_job, compute_capability), *_evaluations(inventory, compute_capability))
    for each in beside:
        requested[each.phase] = max(requested.get(each.phase, 0), compiled_job.standing_bytes + each.peak[0])
    ends = {phase: at for phase, (_, at) in moments.items()}
    return InstantPeaks(inventory, compute_capability, requested, ends, assumed)


def _generations(inventory: Inventory, compiled: Compiled, compute_capability: str) -> tuple[Generation, ...]:
    """What comes before a job's step; most write nothing."""
    if not inventory.job.setup.by.generates:
        return ()
    from peftplan.analytic.generation import generations_of

    return generations_of(inventory, compiled, compute_capability=compute_capability)


def _evaluations(inventory: Inventory, compute_capability: str) -> tuple[Generation, ...]:
    """What follows a job's step; none where nothing is evaluated."""
    if inventory.job.setup.eval_batch_size is None:
        return ()
    from peftplan.analytic.evaluation import evaluation_of

    evaluation = evaluation_of(inventory, compute_capability=compute_capability)
    return () if evaluation is None else (evaluation,)


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
        if phase in ("generate", "evaluate"):
            of = self._peaks.inventory, self._peaks.compute_capability
            beside = _evaluations(*of) if phase == "evaluate" else _generations(of[0], compiled, of[1])
            return compiled.standing + max(beside, key=lambda each: each.peak[0]).lines
        return compiled.standing + Ledger(compiled.timeline.lines(self._peaks.ends[phase], dims))

    def __iter__(self) -> Iterator[str]:
        yield from self._peaks.requested

    def __len__(self) -> int:
        return len(self._peaks.requested)
