"""The peaks of an analytic estimate: its tensors are summed at once, its events replayed when a peak is first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from peftplan.allocator.program import Replayed
from peftplan.analytic.compiled import Compiled
from peftplan.analytic.reserved import SOURCE, Run
from peftplan.ledger import Ledger
from peftplan.results.estimate import PHASES, Peaks


class InstantPeaks(Peaks):
    """Peaks of a compiled job at named sizes. `moments`: phase → bytes of its tensors at its peak, and the events before."""

    def __init__(self, compiled: Compiled, moments: Mapping[str, tuple[int, int]], named: Mapping[str, int], run: Run) -> None:
        requested = {"load": compiled.loading_bytes, **{phase: nbytes for phase, (nbytes, _) in moments.items()}}
        self.__dict__.update(
            run=run,
            requested=requested,
            reserved_source=SOURCE,
            runs_within=run.fits,
            assumed=compiled.assumed(named),
            _written=(compiled, moments, named),
        )

    run: Run
    requested: Mapping[str, int]
    """Phase → bytes of its tensors, without the tails of blocks."""
    _written: tuple[Compiled, Mapping[str, tuple[int, int]], Mapping[str, int]]

    @cached_property
    def _replayed(self) -> Replayed:
        return self.run.peaks()

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
        return _Ledgers(*self._written, self.by_phase)


class _Ledgers(Mapping[str, Ledger]):
    """Phase → what is alive at its peak, each written when it is first read; with tails up to the bytes `allocated` by phase."""

    def __init__(
        self,
        compiled: Compiled,
        moments: Mapping[str, tuple[int, int]],
        named: Mapping[str, int],
        allocated: Mapping[str, int],
    ) -> None:
        self._compiled, self._moments, self._named, self._allocated = compiled, moments, named, allocated
        self._written: dict[str, Ledger] = {}

    def __getitem__(self, phase: str) -> Ledger:
        if phase not in self._written:
            self._written[phase] = self._write(phase).with_tails(self._allocated[phase])
        return self._written[phase]

    def _write(self, phase: str) -> Ledger:
        if phase == "load":
            return self._compiled.loading
        return self._compiled.standing + Ledger(self._compiled.timeline.lines(self._moments[phase][1], self._named))

    def __iter__(self) -> Iterator[str]:
        yield from ("load", *self._moments)

    def __len__(self) -> int:
        return 1 + len(self._moments)
