"""The peaks of an analytic estimate: its tensors are summed at once, its events replayed when a peak is first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from peftplan.allocator.program import Replayed
from peftplan.analytic.compiled import last_step, steps_of
from peftplan.analytic.reserved import SOURCE, Run
from peftplan.ledger import Ledger
from peftplan.results.estimate import PHASES, Peaks

if TYPE_CHECKING:
    from peftplan.job.inventory import Inventory


class InstantPeaks(Peaks):
    """Peaks of a job, which are data: the job itself with its sums, from which the engine replays the run when it is asked to."""

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
            reserved_source=SOURCE,
            assumed=assumed,
        )

    inventory: Inventory
    compute_capability: str
    requested: Mapping[str, int]
    """Phase → bytes of its tensors, without the tails of blocks."""
    ends: Mapping[str, int]
    """Phase of a step → the events before its peak."""

    def run(self) -> Run:
        """The steps that are replayed."""
        return Run(steps_of(self.inventory, self.compute_capability), self.inventory.job.script)

    def runs_within(self, capacity_bytes: int) -> bool:
        """Whether the job runs where the allocator can take so many bytes: it gives cached memory back before it fails."""
        return self.run().fits(capacity_bytes)

    @cached_property
    def _replayed(self) -> Replayed:
        return self.run().peaks()

    @property
    def at_least(self) -> int:
        return max(self.requested.values())

    @property
    def reserved(self) -> int:
        return self._replayed.reserved

    @cached_property
    def by_phase(self) -> dict[str, int]:
        return {phase: max(self.requested[phase], self._replayed.allocated.get(phase, 0)) for phase in PHASES}

    @cached_property
    def ledgers(self) -> Mapping[str, Ledger]:
        return _Ledgers(self)


class _Ledgers(Mapping[str, Ledger]):
    """Phase → what is alive at its peak, each written when it is first read; with tails up to the bytes allocated there."""

    def __init__(self, peaks: InstantPeaks) -> None:
        self._peaks = peaks
        self._written: dict[str, Ledger] = {}

    def __getitem__(self, phase: str) -> Ledger:
        if phase not in self._written:
            self._written[phase] = self._write(phase).with_tails(self._peaks.by_phase[phase])
        return self._written[phase]

    def _write(self, phase: str) -> Ledger:
        compiled, named = last_step(self._peaks.inventory, self._peaks.compute_capability)
        if phase == "load":
            return compiled.loading
        return compiled.standing + Ledger(compiled.timeline.lines(self._peaks.ends[phase], named))

    def __iter__(self) -> Iterator[str]:
        yield from self._peaks.requested

    def __len__(self) -> int:
        return len(self._peaks.requested)
