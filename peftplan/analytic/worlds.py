"""A step at many world sizes: recorded once for all of them that run the same operations (`distributed.any_world`)."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from peftplan.analytic.checks import check
from peftplan.analytic.compile_job import Compiled, compile_job
from peftplan.analytic.compiled import key_of_step
from peftplan.analytic.moments import Moments
from peftplan.analytic.states import own_states, unlike_in_states, without_states
from peftplan.arrays import Ints
from peftplan.distributed.any_world import Worlds, over_any_world, place_of
from peftplan.job.inventory import Inventory, inventory
from peftplan.ledger import Dim, Ledger
from peftplan.memory.timeline import Kind, Timeline
from peftplan.scans import no_scans

SHARED = ("ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")
"""Strategies whose ranks run the same operations in worlds of many sizes."""
RECORDS_KEPT = 32
"""Of each job, and jobs."""
_RECORDS: OrderedDict[tuple[object, ...], tuple[Record, ...]] = OrderedDict()


class Record(NamedTuple):
    """A step recorded at one world size. Dims that follow from it are named sizes, such as `@17`."""

    worlds: Worlds
    compiled: Compiled
    moments: Moments
    places: tuple[int, ...]
    """Of these dims."""


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
        return self.record.moments.at({_name(place): self.values[place] for place in self.record.places})

    def named(self, batch_size: Ints, seq_len: Ints, rank: Ints) -> dict[str, Ints]:
        """Name → sizes for arrays of one length."""
        return self.compiled.sizes(batch_size, seq_len)

    def standing_bytes(self, rank: Ints) -> int:
        """Bytes that last through a step."""
        return self._at(self.compiled.standing_bytes) + self.states

    def loading_bytes(self, rank: Ints) -> int:
        """Bytes at the peak of loading."""
        return self._at(self.compiled.loading_bytes)

    def _at(self, number: int) -> int:
        place = place_of(number)
        return number if place is None else self.values[place]


def over_ranks(of_job: Inventory, compute_capability: str) -> OverRanks:
    """The job at its own world size, seen by its own rank."""
    job = of_job.job
    assert job.distributed is not None
    check(job)
    of_any = job._replace(distributed=job.distributed.model_copy(update={"gpus": None}))
    key = (*key_of_step(of_any, compute_capability), job.multiprocessors)
    world, rank = job.distributed.world_size, (of_job.holding and of_job.holding.rank) or 0
    records = _RECORDS.get(key, ())
    for record in records:
        if (values := record.worlds.at(world, rank)) is not None:
            return _at(record, values, of_job)
    with no_scans():
        record = _record(of_job, Worlds(world, rank), key, compute_capability)
    _RECORDS[key] = (*records, record)[-RECORDS_KEPT:]
    if len(_RECORDS) > RECORDS_KEPT:
        _RECORDS.popitem(last=False)
    own = record.worlds.at(world, rank)
    assert own is not None, "a record holds for the world that it was made of"
    return _at(record, own, of_job)


def _at(record: Record, values: list[int], of_job: Inventory) -> OverRanks:
    """A record at the world size of a job."""
    states = own_states(of_job, record.compiled) if unlike_in_states(of_job.job) else ()
    return OverRanks(record, values, Ledger(states).bytes())


def _record(of_job: Inventory, worlds: Worlds, key: tuple[object, ...], compute_capability: str) -> Record:
    job, holding = of_job.job, of_job.holding
    assert job.distributed is not None
    states_apart = unlike_in_states(job)
    of_any = inventory(job._replace(distributed=over_any_world(job.distributed, worlds, steps_flat=states_apart)))
    if states_apart:
        of_any = of_any._replace(static=Ledger(without_states(of_any.static)))
    if holding is not None and holding.rank is not None and of_any.holding is not None:
        of_any = of_any._replace(holding=of_any.holding._replace(rank=worlds.rank))
    compiled = compile_job(of_any, key, compute_capability=compute_capability, late=False)
    places: dict[int, None] = {}
    moments = Moments(_named(compiled.timeline, places))
    return Record(worlds, compiled, moments, tuple(places))


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
