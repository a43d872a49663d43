"""ZeRO-1 and ZeRO-2 on the tape, of a rank and a world that stay open (`distributed.any_world`).

What only some ranks hold has no elements on the others, so that no question is asked whose answer would differ: every rank and
world has the same record. The levels are those of `memory.zero`, but not every event.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cached_property

from peftplan.arrays import larger, smaller
from peftplan.distributed.zero import Key, Slot
from peftplan.dtypes import ITEMSIZE
from peftplan.memory.zero import REDUCE, Zero, ends_of
from peftplan.units import ALLOCATION_ROUNDING, round512


def flattened_anywhere(reduced: Sequence[Slot], bucket_size: int) -> list[int]:
    """As `flattened` with scatters: 0 for a copy that is not made. Only a single tensor is larger than the bucket."""
    numel = sum(slot.numel for slot in reduced)
    if numel <= bucket_size:
        low, high = ends_of(reduced)
        return [numel * (high > low)]
    (slot,) = reduced
    start, end = slot.start, slot.start + numel
    copies = []
    for _ in range(numel // bucket_size + 1):
        until = smaller((start + bucket_size) // slot.partition * slot.partition + slot.partition, end)
        first_piece = start // slot.partition * slot.partition + slot.partition
        copies.append((until - start) * (first_piece < until))
        start = until
    return copies


class ZeroAnywhere(Zero):
    """The same for every rank of every world, with gradients reduced in their own dtype."""

    anywhere = True
    began = 0
    """1 once gradients of the rank's partition are there."""

    @cached_property
    def own(self) -> dict[Key, int]:
        """The elements of each tensor that belong to the rank."""
        return {key: slot.of_rank(self.rank) for key, slot in self.slots.items()}

    @cached_property
    def kept_until(self) -> list[tuple[int, int]]:
        """Each group, and the elements of the gradients that the rank keeps until it: 0 but for one group."""
        reaching = sum(slot.numel * (self.own[key] > 0) for key, slot in self.slots.items())
        kept, later = [], 0
        unused = self._unused()
        for group in reversed(range(len(self.masters))):
            there = sum(self._of_group(group, unused)) > 0
            kept.append((group, reaching * there * (1 - later)))
            later = larger(later, there)
        return kept

    def _of_group(self, group: int, unused: Container[Key] = ()) -> Iterator[int]:
        return (self.own[key] for key, slot in self.slots.items() if slot.group == group and key not in unused)

    def reduce_ipg_grads(self) -> None:
        reduced = [self.slots[key] for key in self.bucketed]
        large, self.large = self.large, None
        if not reduced:
            return
        stream = REDUCE if self.overlaps else 0
        for numel in flattened_anywhere(reduced, self.bucket_size) if self.scatters else ():
            self._new((numel,), self.dtype, "flattened bucket", stream)
        of_rank = sum(self.own[key] for key in self.bucketed)
        if self.offloads:
            self.copy_to_host(stream)
        else:
            begins = (of_rank > 0) * (1 - self.began)
            self.began += begins
            for last_group, numel in self.kept_until:
                self._keep(numel * begins, last_group=last_group)
        if large is not None and not self.partitions_gradients:
            numel, dtype = reduced[0].numel, large.dtype
            del large
            self.others.append(self._new((numel * (of_rank == 0),), dtype, "gradient of other ranks", 0, "gradients"))
        self.bucketed.clear()
        self.num_bucketed = 0

    def end_backward(self) -> None:
        super().end_backward()
        self.began = 0

    def copy_to_host(self, stream: int) -> None:
        """The casts to fp32 need less than the norms."""
        there = self._normed([self.own[key] for key in self.bucketed] if self.syncs else [], stream)
        self.norms.append(self._new((there,), "uint8", "norms of gradients", stream, "temporaries"))

    def _norms(self) -> None:
        self._normed(self.own.values(), 0)

    def _normed(self, numels: Iterable[int], stream: int) -> int:
        """Allocate as much as the norms of gradients need at their highest; return what is left of them."""
        highest = there = 0
        for numel in numels:
            some = numel > 0
            highest = larger(highest, some * (there + round512(ITEMSIZE["fp64"] * numel) + ALLOCATION_ROUNDING))
            there += some * ALLOCATION_ROUNDING
        self._new((highest,), "uint8", "norms at their highest", stream, "temporaries")
        return there

    def _flatten(self, group: int) -> None:
        parts = sum(numel > 0 for numel in self._of_group(group))
        numel = self.masters[group].numel
        flat = self._new((numel * (parts > 1),), self.dtype, "flat gradients", 0, "gradients")
        self.flat = self._new((numel,), "fp32", "fp32 gradients", 0, "gradients")
        del flat
        self.averaged = [(last_group, kept) for last_group, kept in self.averaged if last_group > group]
