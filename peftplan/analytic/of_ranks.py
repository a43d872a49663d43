"""The peaks of a job over several GPUs: those of the one where they are largest.

Which one requests the most is known at once. What the allocator counts beyond that, the tails of blocks, differs between GPUs by
up to 0.5 %: so each of them is replayed when a peak is first read, up to `MOST_UNLIKE` unlike ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from peftplan.analytic.instant import InstantPeaks, Known, peaks_of_one
from peftplan.analytic.rank_facts import RankFacts, rank_facts
from peftplan.analytic.reserved import Run, peaks_of_each
from peftplan.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peftplan.distributed.zero_ranks import Unlike

MOST_UNLIKE = 16
"""Up to so many unlike ranks each is counted on its own: less than 0.2 s of each of ZeRO-2 for 8B parameters."""


class OfRanks(InstantPeaks):
    """Peaks of all GPUs of a job, as data. `requested` are those of the GPU that requests most, whose `inventory` this is; all
    others those of `largest`.
    """

    def __init__(self, own: InstantPeaks, others: Sequence[InstantPeaks] = (), *, known: Known, of_devices: bool = False) -> None:
        """`own`: those of the GPU that requests most. `others`: those that were computed of others; `of_devices`: of every GPU of
        a `device_map`. `known`: the moments of their steps."""
        super().__init__(own.inventory, own.compute_capability, own.requested, own.ends, own.assumed)
        of_ranks = (own,) if of_devices else (own, *others)
        of_rank = {(each.inventory.holding and each.inventory.holding.rank) or 0: each for each in of_ranks}
        self.__dict__.update(_of_devices=tuple(others) if of_devices else (), _of_rank=of_rank, _known=known)

    _of_devices: tuple[InstantPeaks, ...]
    """Those of each GPU of a `device_map`."""
    _of_rank: dict[int, InstantPeaks]
    _known: Known

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_facts"} | {"_known": {}}

    @cached_property
    def _facts(self) -> RankFacts:
        return rank_facts(self.inventory, self.compute_capability)

    @cached_property
    def each(self) -> tuple[InstantPeaks, ...]:
        """Those of every GPU that is counted: of alike ranks those of the first, and of those that run alike."""
        return self._of_devices or tuple(map(self._on, self._facts.unlike_runs(self._counted)))

    def of(self, rank: int) -> InstantPeaks | None:
        """Those of one rank; None where it is not counted."""
        return self._on(rank) if self._first(rank) in self._counted else None

    def _on(self, rank: int) -> InstantPeaks:
        rank = self._first(rank)
        if rank not in self._of_rank:
            of_rank = self._facts.on_rank(rank)._replace(job=self.inventory.job)
            self._of_rank[rank] = peaks_of_one(of_rank, self.compute_capability, self._known)
        return self._of_rank[rank]

    def _first(self, rank: int) -> int:
        """The first rank of ZeRO-1 and ZeRO-2 whose step allocates the same."""
        return rank if self._unlike is None else self._unlike.like[rank]

    @property
    def _unlike(self) -> Unlike | None:
        return self._facts.unlike

    @cached_property
    def _counted(self) -> tuple[int, ...]:
        """The ranks that are counted. Not those with short parts of a matrix, and those that receive what the first one reads:
        they were not rehearsed. Of more than `MOST_UNLIKE` unlike ones those of which one requests most, and the last.
        """
        job, (own, *_) = self.inventory.job, self._of_rank
        assert job.distributed is not None
        in_stages = (job.distributed.pp_size or 1) > 1
        if (job.distributed.divided > 1 and not in_stages) or job.distributed.cpu_ram_efficient_loading:
            return (own,)
        ranks: Sequence[int] = self._facts.first_ranks
        if len(ranks) > MOST_UNLIKE:
            places = range((job.distributed.cp_size or 1) if job.distributed.strategy == "fsdp2" else 0)
            ranks = [*(() if self._unlike is None else self._unlike.largest), *places, ranks[-1]]
        return tuple(dict.fromkeys(map(self._first, (own, *ranks))))

    @cached_property
    def _judged(self) -> tuple[InstantPeaks, ...]:
        """Those of every GPU that a verdict counts: under ZeRO-1 and ZeRO-2 of further ones that may reserve most."""
        further = () if self._unlike is None else map(self._on, self._facts.further)
        return tuple({id(own): own for own in (*self.each, *further)}.values())

    @property
    def by_pace(self) -> bool:
        return self._waits and self.unreserved is None

    @property
    def _waits(self) -> bool:
        """Whether freed blocks wait for the GPU: FSDP1 calls `record_stream`."""
        distributed = self.inventory.job.distributed
        return distributed is not None and distributed.strategy == "fsdp1"

    def _late(self) -> Iterator[Run]:
        """The runs of FSDP1 with a GPU as late as it may be, which may reserve more."""
        for rank in self._facts.unlike_runs((0, *self._facts.further)):
            yield self._on(rank).run(late=True)

    def runs_within(self, capacity_bytes: int) -> bool:
        runs = self._late() if self._waits else (own.run() for own in self._judged)
        return all(run.fits(capacity_bytes) for run in runs)

    def may_run_within(self, capacity_bytes: int) -> bool:
        """Whether the job runs there if the GPU is never late, and is not known to run otherwise."""
        return self._waits and self.at_least <= capacity_bytes and self.largest.run().fits(capacity_bytes)

    @cached_property
    def largest(self) -> InstantPeaks:
        each = self._replayed_together(self.each)
        return each[0] if len(each) == 1 else max(each, key=lambda own: own.allocated)

    @property
    def ranks_compared(self) -> tuple[int, ...]:
        """Under ZeRO-1 and ZeRO-2 the ranks of which one requests most."""
        return () if self._unlike is None else self._unlike.largest

    @property
    def largest_ranks(self) -> tuple[int, ...]:
        """The rank that allocates most, and that which reserves most."""
        both = self.largest, max(self._judged, key=lambda own: own.replayed_reserved)
        return tuple(dict.fromkeys(own.inventory.holding.rank or 0 for own in both if own.inventory.holding is not None))

    @property
    def by_phase(self) -> dict[str, int]:
        return self.largest.by_phase

    @property
    def replayed_reserved(self) -> int:
        return self.largest.replayed_reserved

    @cached_property
    def replayed_at_most(self) -> int:
        late = peaks_of_each([*self._late()]) if self._waits else []
        in_time = [own.replayed for own in self._replayed_together(self._judged)]
        return max(replayed.reserved for replayed in in_time + late)

    def _replayed_together(self, those: tuple[InstantPeaks, ...]) -> tuple[InstantPeaks, ...]:
        """The same peaks, which a replay of all of them fills in."""
        missing = [own for own in those if "replayed" not in own.__dict__]
        if len(missing) > 1:
            for own, replayed in zip(missing, peaks_of_each([own.run() for own in missing]), strict=True):
                own.__dict__["replayed"] = replayed
        return those

    @property
    def ledgers(self) -> Mapping[str, Ledger]:
        return self.largest.ledgers

    @property
    def static(self) -> Ledger:
        return self.largest.inventory.static
