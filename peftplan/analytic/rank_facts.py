"""What the ranks of a job hold and how they differ, kept for all sizes that run the same operations."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

from peftplan.analytic.compiled import key_of_step, last_step
from peftplan.analytic.states import own_states, unlike_in_states
from peftplan.job.inventory import further_ranks, on_each_device, on_rank

if TYPE_CHECKING:
    from peftplan.analytic.compile_job import Compiled
    from peftplan.distributed.zero_ranks import Unlike
    from peftplan.job.inventory import Inventory


class RankFacts:
    """The ranks of a job, each looked at when it is first needed. Nothing here depends on the batch or the sequence."""

    def __init__(self, of_largest: Inventory, compute_capability: str) -> None:
        self._of_largest, self._compute_capability = of_largest, compute_capability
        self._on_rank: dict[int, Inventory] = {}
        self._states: dict[int, object] = {}

    def on_rank(self, rank: int) -> Inventory:
        """The job as one of its ranks sees it."""
        if rank not in self._on_rank:
            self._on_rank[rank] = on_rank(self._of_largest, rank)
        return self._on_rank[rank]

    @cached_property
    def first_ranks(self) -> tuple[int, ...]:
        """The first rank of each group of ranks that hold tensors of the same shapes."""
        from peftplan.distributed.alike import alike

        job = self._of_largest.job
        assert job.distributed is not None
        groups = alike(self._of_largest.parameters, job.distributed, job.architecture, autocast=str(job.setup.autocast))
        return tuple(first for first, *_ in groups)

    @cached_property
    def further(self) -> tuple[int, ...]:
        """`further_ranks` of the job."""
        return further_ranks(self._of_largest)

    @cached_property
    def unlike(self) -> Unlike | None:
        """The ranks of a job of ZeRO-1 or ZeRO-2, compared; None of other jobs."""
        return unlike(self._of_largest, self._step(0).reduced)

    def unlike_runs(self, ranks: Iterable[int]) -> list[int]:
        """The first of all ranks that allocate the same, in the same order: in blocks, shards of unlike tensors may be alike."""
        ranks = list(dict.fromkeys(ranks))
        if len(ranks) == 1 or not unlike_in_states(self._of_largest.job):
            return ranks
        first_with: dict[object, int] = {}
        for rank in ranks:
            first_with.setdefault(self._blocks_of_states(rank), rank)
        return list(first_with.values())

    def _blocks_of_states(self, rank: int) -> object:
        if rank not in self._states:
            states = own_states(self.on_rank(rank), self._step(0))
            self._states[rank] = tuple((line.name, line.copies, line.bytes()) for line in states)
        return self._states[rank]

    def _step(self, rank: int) -> Compiled:
        return last_step(self.on_rank(rank), self._compute_capability)[0]


def unlike(of_any: Inventory, reduced: tuple[tuple[str, int | None], ...]) -> Unlike | None:
    """The ranks of a job of ZeRO-1 or ZeRO-2, compared; None of other jobs. `reduced`: its tensors in the order in which backward
    reduces their gradients.
    """
    job = of_any.job
    if job.distributed is None or job.distributed.strategy not in ("zero1", "zero2"):
        return None
    from peftplan.distributed.zero import reduce_bucket
    from peftplan.distributed.zero_ranks import unlike_ranks
    from peftplan.job.teacher import trained_together

    bucket_size = reduce_bucket(job.distributed, job.architecture.hidden_size or 0)
    dtype = str(job.setup.autocast)
    trained = trained_together(job, of_any.parameters)
    return unlike_ranks(trained, job.distributed, reduced, bucket_size=bucket_size, dtype=dtype)


_KEPT: OrderedDict[object, RankFacts] = OrderedDict()
MOST_KEPT = 16


def rank_facts(of_largest: Inventory, compute_capability: str) -> RankFacts:
    """The ranks of a job, as they were looked at before where its steps are known."""
    key = key_of_step(of_largest.job, compute_capability), of_largest.job.multiprocessors
    facts = _KEPT.pop(key, None) or RankFacts(of_largest, compute_capability)
    _KEPT[key] = facts
    if len(_KEPT) > MOST_KEPT:
        _KEPT.popitem(last=False)
    return facts


_DEVICES: deque[tuple[Inventory, list[Inventory]]] = deque(maxlen=4)
"""What each GPU of a `device_map` was seen to hold last."""


def devices(of_any: Inventory) -> list[Inventory]:
    """`on_each_device`, as they were looked at before where a job holds the same tensors: it has other sizes then."""
    for latest, each in _DEVICES:
        if latest.parameters is of_any.parameters and latest.static is of_any.static:
            return [own._replace(job=of_any.job) for own in each]
    _DEVICES.appendleft((of_any, each := on_each_device(of_any)))
    return each
