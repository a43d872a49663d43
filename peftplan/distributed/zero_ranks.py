"""Which ranks of ZeRO-1 and ZeRO-2 can need the most memory: a step of each holds the same tensors but for a few.

At any moment the bytes of a rank are those that all ranks hold, and its own. So a rank whose own bytes are at no moment more than
those of another one cannot need more, whatever the batch and the sequence are. Its own bytes, in blocks of the allocator:

    backward   gradients of all tensors that reach into its partition, from the reduction of the first of them on; under ZeRO-1
               also large gradients of other ranks, which stay until all are reduced; with the optimizer on the host norms and
               fp32 copies of its parts while they are reduced; at the end zeros for parameters that got no gradient
    step       norms of its parts in fp64, one after the other; the gradients of a group in one piece, where it has two or more
               parts of it; those of its partition until the last group of which it has a part, and zeros until that of each

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, as `memory.zero` runs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from peftplan.distributed.strategy import Distributed
from peftplan.distributed.zero import Key, Slot, slots_of
from peftplan.dtypes import ITEMSIZE
from peftplan.parameters import Parameters
from peftplan.units import ALLOCATION_ROUNDING, ceil_div, round512

MOST_COMPARED = 16
"""Ranks that are compared: up to so many ranks of a job, all of them."""


class OwnBytes(NamedTuple):
    """What a rank holds beside that which all ranks hold."""

    backward: tuple[tuple[int, int], ...]
    """(reduction, bytes from there on), in the order of the reductions."""
    moments: tuple[int, ...]
    """Bytes at other moments, the same ones of every rank."""

    def covers(self, other: OwnBytes) -> bool:
        """Whether these are at every moment at least the bytes of another rank."""
        return all(own >= others for own, others in zip(self.moments, other.moments, strict=True)) and all(
            self._after(reduction) >= nbytes for reduction, nbytes in other.backward
        )

    @property
    def highest(self) -> int:
        """The most bytes at any moment."""
        return max(*self.moments, *(nbytes for _, nbytes in self.backward), 0)

    def _after(self, reduction: int) -> int:
        return next((nbytes for at, nbytes in reversed(self.backward) if at <= reduction), 0)


class Unlike(NamedTuple):
    """The ranks of a job, compared."""

    largest: tuple[int, ...]
    """Those of which one needs the most, at every batch size and sequence length, equal ones once; of more than `MOST_COMPARED`
    those that hold most of their own, and others evenly spread."""
    like: tuple[int, ...]
    """Rank → the first rank whose step allocates the same."""


class Part(NamedTuple):
    """A rank's part of a tensor."""

    slot: Slot
    numel: int
    reduced: tuple[int, int] | None
    """When its gradient is reduced: the number of the bucket, and that of the tensor; None where it gets none."""


@lru_cache(maxsize=256)
def unlike_ranks(
    parameters: Parameters, distributed: Distributed, reduced: tuple[Key, ...], *, bucket_size: int, dtype: str
) -> Unlike:
    """The ranks of a job of ZeRO-1 or ZeRO-2. `reduced`: its tensors in the order in which backward reduces their gradients;
    `bucket_size` in elements; `dtype` of the gradients.
    """
    slots = slots_of(parameters, distributed)
    step = Step(slots, _buckets(slots, reduced, bucket_size), bucket_size, ITEMSIZE[dtype], distributed)
    parts: list[list[Part]] = [[] for _ in range(distributed.world_size)]
    for key, slot in slots.items():
        for rank, numel in slot.parts:
            parts[rank].append(Part(slot, numel, step.buckets.get(key)))
    firsts: dict[object, int] = {}
    like: list[int] = []
    front: dict[int, OwnBytes] = {}
    for rank, of_rank in enumerate(parts):
        own = step.own_bytes(of_rank)
        in_order = of_rank if not step.offloads else _as_reduced(of_rank)
        sequence = own, tuple((part.slot.group, part.numel, part.reduced and part.reduced[0]) for part in in_order)
        like.append(firsts.setdefault(sequence, rank))
        if like[rank] == rank and not any(other.covers(own) for other in front.values()):
            front = {**{other: theirs for other, theirs in front.items() if not own.covers(theirs)}, rank: own}
    return Unlike(_fewer(front), tuple(like))


def _fewer(front: Mapping[int, OwnBytes]) -> tuple[int, ...]:
    """At most `MOST_COMPARED` of these ranks. Of small buckets each can have its moment: with the optimizer on the host that when
    its parts are copied, under ZeRO-1 gradients that it alone does not keep.
    """
    ranks = sorted(front)
    if len(ranks) <= MOST_COMPARED:
        return tuple(ranks)
    most = sorted(ranks, key=lambda rank: front[rank].highest, reverse=True)[: MOST_COMPARED // 2]
    spread = ranks[:: -ceil_div(len(ranks), MOST_COMPARED // 2 - 1)]
    return tuple(sorted({*most, *spread, ranks[0]}))


def _buckets(slots: Mapping[Key, Slot], reduced: Iterable[Key], bucket_size: int) -> dict[Key, tuple[int, int]]:
    """Tensor → the number of the bucket in which its gradient is reduced, and its own (`Zero.reduce_independent`)."""
    bucket = filled = 0
    buckets = {}
    for number, key in enumerate(reduced):
        if filled + slots[key].numel > bucket_size:
            bucket, filled = bucket + 1, 0
        buckets[key] = bucket, number
        filled += slots[key].numel
    return buckets


def _as_reduced(parts: Iterable[Part]) -> list[Part]:
    return sorted((part for part in parts if part.reduced), key=lambda part: part.reduced or (0, 0))


class Step:
    """The step of a job, of which each rank runs its own part."""

    def __init__(
        self,
        slots: Mapping[Key, Slot],
        buckets: Mapping[Key, tuple[int, int]],
        bucket_size: int,
        itemsize: int,
        distributed: Distributed,
    ) -> None:
        self.buckets, self.itemsize = buckets, itemsize
        self.offloads = distributed.offload_optimizer == "cpu"
        self.num_buckets = 1 + max((bucket for bucket, _ in buckets.values()), default=0)
        self.partitions = [*{slot.group: slot.partition for slot in slots.values()}.values()]
        """Elements of a rank's part of each group."""
        of_stage_1 = buckets.items() if distributed.strategy == "zero1" else ()
        self.left = [(bucket, slots[key]) for key, (bucket, _) in of_stage_1 if slots[key].numel > bucket_size]
        """Gradients larger than a bucket, which ranks without a part of them keep until all are reduced."""

    def own_bytes(self, parts: Sequence[Part]) -> OwnBytes:
        """What a rank with these parts holds beside that which all ranks hold."""
        first = min((part.reduced[0] for part in parts if part.reduced), default=None)
        gradients = 0 if first is None or self.offloads else self._rounded(sum(part.slot.numel for part in parts))
        rises = {} if first is None else {first: gradients}
        mine = {id(part.slot) for part in parts}
        for bucket, slot in self.left:
            rises[bucket] = rises.get(bucket, 0) + (self._rounded(slot.numel) if id(slot) not in mine else 0)
        buckets = sorted(rises)
        backward = zip(buckets, accumulate(rises[bucket] for bucket in buckets), strict=True)
        return OwnBytes(tuple(backward), tuple(self._to_host(parts) if self.offloads else self._stepping(parts, gradients)))

    def _rounded(self, numel: int) -> int:
        return round512(self.itemsize * numel)

    def _stepping(self, parts: Sequence[Part], gradients: int) -> Iterator[int]:
        """Bytes behind the last reduction and at the highest norm, and while the gradients of each group are flattened and behind
        it."""
        zeros: Counter[int] = Counter()
        for part in parts:
            zeros[part.slot.group] += 0 if part.reduced else self._rounded(part.slot.numel)
        there = gradients + zeros.total()
        norms = (number * ALLOCATION_ROUNDING + round512(ITEMSIZE["fp64"] * part.numel) for number, part in enumerate(parts))
        yield there
        yield there + max(norms, default=0)
        for group, _ in enumerate(self.partitions):  # those of a later backward, which are added to the first
            yield there + zeros[group - 1] + zeros[group]
        of_group, of_gradients = Counter(part.slot.group for part in parts), {part.slot.group for part in parts if part.reduced}
        for group, numel in enumerate(self.partitions):
            yield there + (self._rounded(numel) if of_group[group] > 1 else 0)
            if not any(later > group for later in of_gradients):
                there -= gradients
                gradients = 0
            there -= zeros[group]
            yield there

    def _to_host(self, parts: Sequence[Part]) -> Iterator[int]:
        """Bytes at the highest norm of each bucket and behind it: norms stay, and each is there beside its fp64 copy."""
        of_buckets: list[list[Part]] = [[] for _ in range(self.num_buckets)]
        for part in _as_reduced(parts):
            of_buckets[part.reduced[0] if part.reduced else 0].append(part)
        there = 0
        for of_bucket in of_buckets:
            highest = there
            for part in of_bucket:
                there += ALLOCATION_ROUNDING
                highest = max(highest, there + round512(ITEMSIZE["fp64"] * part.numel))
            yield highest
            yield there
