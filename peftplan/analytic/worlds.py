"""A step at many world sizes: recorded once for all of them that run the same operations (`distributed.any_world`)."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from peftplan.analytic.checks import check
from peftplan.analytic.compile_job import Compiled, compile_job
from peftplan.analytic.compiled import key_of_step
from peftplan.analytic.lazy import lazy
from peftplan.analytic.rank_facts import unlike
from peftplan.analytic.states import own_states, unlike_in_states, without_states
from peftplan.arrays import Ints
from peftplan.distributed.any_world import Worlds, over_any_world, place_of
from peftplan.job.inventory import Inventory, inventory, of_any_device, on_rank
from peftplan.ledger import Dim, Ledger
from peftplan.memory.timeline import Kind, Timeline
from peftplan.scans import no_scans
from peftplan.units import MIB, round512

if TYPE_CHECKING:
    from peftplan.analytic.moments import At, Moments, Part

SHARED = ("ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")
"""Strategies whose ranks run the same operations in worlds of many sizes."""
RECORDS_KEPT = 32
"""Of each job, and jobs."""
_RECORDS: OrderedDict[tuple[object, ...], tuple[Record, ...]] = OrderedDict()
_NAMED: deque[tuple[Record, Ints, Ints, At]] = deque(maxlen=16)
NAMED_BYTES = 64 * MIB
"""What the arrays of kept points may take before others are kept."""


@dataclass(frozen=True, eq=False)
class Record:
    """A step recorded at one world size."""

    worlds: Worlds
    compiled: Compiled

    @cached_property
    def moments(self) -> tuple[Moments, tuple[int, ...]]:
        """Its moments, where dims that follow from the world size are named sizes, such as `@17`; and the places of these."""
        from peftplan.analytic.moments import Moments

        places: dict[int, None] = {}
        return Moments(_named(self.compiled.timeline, places)), tuple(places)


class OverRanks(NamedTuple):
    """A job at one world size: what `Ranked` is at one LoRA rank."""

    record: Record
    values: list[int]
    """Every number of the record at this world size, by place."""
    states: int
    """Bytes of the states that the record leaves out."""

    @property
    def compiled(self) -> Compiled:
        """The step, at all world sizes."""
        return self.record.compiled

    def moments(self) -> Moments:
        """The moments of the step."""
        return self.record.moments[0].at(self._numbers)

    def part(self) -> Part:
        """The step beside those of other GPUs, for `overall`."""
        from peftplan.analytic.moments import Part

        return Part(self.moments(), self._standing, self._loading)

    @property
    def _numbers(self) -> dict[str, int]:
        """The named sizes of the record that are numbers at this world size."""
        return {_name(place): self.values[place] for place in self.record.moments[1]}

    def requested(self, batch_size: int, seq_len: int) -> dict[str, int]:
        """Phase → bytes that the tensors at its peak request, as of `analytic_peaks`."""
        sizes, timeline = self.compiled.sizes(batch_size, seq_len), self.compiled.timeline
        rounded = [round512(self._at(nbytes) * prod([sizes[name] for name in names])) for nbytes, names in timeline.sizes]
        peaks = timeline.waves.peaks([count * rounded[place] for place, count in timeline.moves], self._standing)
        return {"load": self._loading, **{phase: nbytes for phase, (nbytes, _) in peaks.items()}}

    def named(self, batch_size: Ints, seq_len: Ints, rank: Ints) -> At:
        """The named sizes at arrays of one length; those of the last points are kept, for other ranks and worlds."""
        from peftplan.analytic.moments import At

        for record, batches, lengths, kept in _NAMED:
            same = record is self.record and len(batches) == len(batch_size)
            if same and (batches == batch_size).all() and (lengths == seq_len).all():
                return kept
        while sum(kept.num_bytes for *_, kept in _NAMED) > NAMED_BYTES:
            _NAMED.popleft()
        sizes = At(len(rank), self.compiled.sizes_read(lazy(batch_size), lazy(seq_len)))
        _NAMED.append((self.record, batch_size, seq_len, sizes))
        return sizes

    def standing_bytes(self, rank: Ints) -> int:
        """Bytes that last through a step."""
        return self._standing

    def loading_bytes(self, rank: Ints) -> int:
        """Bytes at the peak of loading."""
        return self._loading

    @property
    def _standing(self) -> int:
        return self._at(self.compiled.standing_bytes) + self.states

    @property
    def _loading(self) -> int:
        return self._at(self.compiled.loading_bytes)

    def _at(self, number: int) -> int:
        place = place_of(number)
        return number if place is None else self.values[place]


def over_ranks(of_job: Inventory, compute_capability: str) -> OverRanks:
    """The job at its own world size, seen by its own rank."""
    job = of_job.job
    assert job.distributed is not None
    check(job)
    of_any = job._replace(distributed=job.distributed.model_copy(update={"gpus": None, "nodes": 1}))
    key = (*key_of_step(of_any, compute_capability)[1:], job.multiprocessors)  # a record says what it goes by of the batch size
    own = job.distributed.world_size, (of_job.holding and of_job.holding.rank) or 0, job.setup.batch_size
    records = _RECORDS.get(key, ())
    for record in reversed(records):  # the next world is like the last one most often
        if (values := record.worlds.at(*own)) is not None:
            return _at(record, values, of_job)
    with no_scans():
        record = _record(of_job, Worlds(*own), key, compute_capability)
    _RECORDS[key] = (*records, record)[-RECORDS_KEPT:]
    if len(_RECORDS) > RECORDS_KEPT:
        _RECORDS.popitem(last=False)
    values = record.worlds.at(*own)
    assert values is not None, "a record holds for the world that it was made of"
    return _at(record, values, of_job)


def requested(of_job: Inventory, compute_capability: str) -> dict[str, int]:
    """`analytic_peaks(...).requested` of a job that may share its record with others."""
    ranks: tuple[int | None, ...] = (None,)
    if of_any_device(of_job):
        compared = unlike(of_job, over_ranks(on_rank(of_job, 0), compute_capability).compiled.reduced)
        assert compared is not None
        ranks = compared.largest
    each = (over_ranks(of_job if rank is None else on_rank(of_job, rank), compute_capability) for rank in ranks)
    setup = of_job.job.setup
    return max((of.requested(setup.batch_size, setup.seq_len) for of in each), key=lambda by_phase: max(by_phase.values()))


def _at(record: Record, values: list[int], of_job: Inventory) -> OverRanks:
    """A record at the world size of a job."""
    states = own_states(of_job, record.compiled) if unlike_in_states(of_job.job) else ()
    return OverRanks(record, values, Ledger(states).bytes())


def _record(of_job: Inventory, worlds: Worlds, key: tuple[object, ...], compute_capability: str) -> Record:
    job, holding = of_job.job, of_job.holding
    assert job.distributed is not None
    states_apart = unlike_in_states(job)
    distributed = over_any_world(job.distributed, worlds, steps_flat=states_apart)
    setup = job.setup.model_copy(update={"batch_size": worlds.batch_size})
    of_any = inventory(job._replace(distributed=distributed, setup=setup))
    if states_apart:
        of_any = of_any._replace(static=Ledger(without_states(of_any.static)))
    if holding is not None and holding.rank is not None and of_any.holding is not None:
        of_any = of_any._replace(holding=of_any.holding._replace(rank=worlds.rank))
    return Record(worlds, compile_job(of_any, key, compute_capability=compute_capability, late=False))


def _named(timeline: Timeline, places: dict[int, None]) -> Timeline:
    """The timeline with names for dims that follow from the world size, whose places are put down."""

    def named(dim: Dim) -> Dim:
        place = place_of(dim)
        if place is None:
            return dim
        places[place] = None
        return _name(place)

    return timeline._replace(kinds=tuple(Kind(*kind[:3], tuple(map(named, kind.dims))) for kind in timeline.kinds))


def _name(place: int) -> str:
    return f"@{place}"
