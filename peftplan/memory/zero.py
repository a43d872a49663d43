"""ZeRO-1 and ZeRO-2 on the tape: buckets of gradients, the gradients of a rank's partition, and the step over flat masters.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py; methods have its names. Where the reduction overlaps with backward, its
buffers come from a stream of its own, whose blocks the allocator keeps apart.

    backward   a gradient arrives: copied into the bucket and freed | bucket full: copied once more in one piece, all-reduced; the
               rank keeps those gradients of which a part is its own, in one tensor | at the end: zeros for parameters of its
               partition that got no gradient
    step       group by group: gradients in one flat tensor, cast to fp32, step over the masters
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from peftplan.arrays import larger, smaller
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.zero import Key, Slot, slots_of
from peftplan.memory.model import Model
from peftplan.memory.zero_stage import Stage
from peftplan.parameters import Parameter as Family
from peftplan.parameters import Parameters
from peftplan.tape.tensors import Parameter, Tensor

REDUCE = 1
"""The stream of the reduction; 0 is the default one."""
OfRank = tuple[int, Tensor]
"""The last group of which the rank has a gradient, and gradients of its partition: they are freed there."""


def flattened(reduced: Iterable[Slot], bucket_size: int, *, scatters: bool) -> list[tuple[int, bool]]:
    """Elements of the tensors in which a bucket is reduced, and whether each is a flat copy (`allreduce_and_scatter`).

    Neighbours of one rank are a piece, and a single piece is not copied.
    """
    reduced = [*reduced]
    numel = sum(slot.numel for slot in reduced)
    if scatters and 0 < numel <= bucket_size:  # all pieces are one copy, in whatever order
        low, high = ends_of(reduced)
        return [(numel, bool(high > low))]
    parts = (part for slot in reduced if scatters for part in slot.parts)
    pieces = [sum(numel for _, numel in of_rank) for _, of_rank in groupby(parts, lambda part: part[0])]
    copies: list[tuple[int, bool]] = []
    while pieces:
        small: list[int] = []
        while pieces and sum(small) <= bucket_size:
            small.append(pieces.pop(0))
        copies.append((sum(small), len(small) > 1))
    return copies


def ends_of(reduced: Sequence[Slot]) -> tuple[int, int]:
    """The first and the last rank that have a part of some tensors."""
    low, high = reduced[0].ends
    for first, last in (slot.ends for slot in reduced):
        low, high = smaller(low, first), larger(high, last)
    return low, high


class Zero(Stage):
    """Gradients, buckets and flat groups of one rank. `masters`: the fp32 masters of each group, `trained`: what they are of."""

    anywhere = False
    """Whether the rank stays open."""

    def __init__(
        self, model: Model, masters: tuple[Family, ...], distributed: Distributed, *, dtype: str, rank: int, trained: Parameters
    ) -> None:
        super().__init__(model, distributed, dtype=dtype)
        self.masters = masters
        self.slots = slots_of(trained, distributed)
        self.partitions_gradients = distributed.strategy == "zero2"
        self.scatters = distributed.reduce_scatter is not False
        self.rank = rank
        self.order: dict[Key, None] = {}
        """The tensors in the order in which their gradients are reduced."""
        self.bucketed: list[Key] = []
        self.buffers: list[Tensor] = []
        self.of_rank: list[OfRank] = []
        """Gradients of this backward that belong to the rank: `grads_in_partition`."""
        self.averaged: list[OfRank] = []
        """Those of all backwards of the step."""
        self.others: list[Tensor] = []
        """Gradients of other ranks that are larger than the bucket: ZeRO-1 leaves them in place until all are reduced."""
        self.has_zeros = False
        """Whether zeros stand for the gradients of this step that some parameters do not get."""
        self.f.accumulated = self.accumulated

    # -- backward ----------------------------------------------------------------------------------------------------------------

    def accumulated(self, p: Parameter) -> None:
        """`process_gradients`: the hook of a parameter that has its gradient, which autograd holds until it returns."""
        _gradient = p.grad
        self.setup_buckets()
        self.reduced.add(p.name)
        if self.partitions_gradients or (self.overlaps and self.syncs):
            self.reduce_independent(p)

    def setup_buckets(self) -> None:
        """Make the bucket, two where the reduction overlaps, with the first gradient."""
        while len(self.buffers) < (2 if self.overlaps else 1):
            self.buffers.append(self._new((self.bucket_size,), self.dtype, "bucket of gradients", 0))

    def reduce_independent(self, p: Parameter) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`: a gradient moves into the bucket; a full one is reduced first."""
        key = self._key(p)
        numel = self.slots[key].numel
        if self.num_bucketed + numel > self.bucket_size:
            self.reduce_ipg_grads()
        if numel > self.bucket_size:
            self.large = self._new((numel,), self.dtype, "clone of a gradient", 0, "gradients") if self.offloads else p.grad
        p.grad = None
        self.order[key] = None
        self.bucketed.append(key)
        self.num_bucketed += numel

    def reduce_ipg_grads(self) -> None:
        """Reduce the bucket, copied in one piece unless all of it is one rank's; then keep what is this rank's."""
        reduced = [self.slots[key] for key in self.bucketed]
        stream = REDUCE if self.overlaps else 0
        for numel, is_copy in flattened(reduced, self.bucket_size, scatters=self.scatters):
            flat = self._new((numel,), self.dtype, "flattened bucket", stream) if is_copy else None
            if self.reduced_dtype is not None:
                self._new((numel,), self.reduced_dtype, "bucket in the dtype of the reduction", stream)
            del flat
        if self.offloads:
            self.copy_to_host(stream)
        elif not self.of_rank and any(slot.of_rank(self.rank) for slot in reduced):
            reaching = {key: slot for key, slot in self.slots.items() if slot.of_rank(self.rank)}
            unused = self._unused()
            last = max(slot.group for key, slot in reaching.items() if key not in unused)
            self._keep(sum(slot.numel for slot in reaching.values()), last_group=last)
        if self.large is not None and not (self.partitions_gradients or reduced[0].of_rank(self.rank)):
            self.others.append(self.large)
        self.large = None
        self.bucketed.clear()
        self.num_bucketed = 0

    def _unused(self) -> set[Key]:
        """The tensors that the model's forward has not read, which get no gradient."""
        used, own = {key for key, _ in self.model.used_by_layer()}, {p.name for p in self.model.parameters.all}
        return {key for key in self.slots if key[0] in own and key not in used}

    def _keep(self, numel: int, *, last_group: int) -> None:
        """The gradients of the rank's partition in one tensor; `last_group`: as in `OfRank`."""
        stream = REDUCE if self.overlaps else 0
        kept = self._new((numel,), self.dtype, "gradients of the rank's partition", stream, "gradients")
        self.of_rank.append((last_group, kept))

    def copy_to_host(self, stream: int) -> None:
        """`copy_grads_in_partition` where the optimizer is on the host: norms in fp64, then casts to fp32, at a boundary."""
        for numel in (self.slots[key].of_rank(self.rank) for key in self.bucketed if self.syncs):
            if numel:
                self._norm(numel, stream)
                self._new((numel,), "fp32", "fp32 gradient", stream, "temporaries")

    def end_backward(self) -> None:
        """`independent_gradient_partition_epilogue`. ZeRO-1 reduces here, and only at a boundary."""
        if not self.partitions_gradients and not self.syncs:
            return
        by_key = dict(self.model.used_by_layer())
        for key in self.slots:
            if (p := by_key.get(key)) is not None and p.grad is not None:
                self.reduce_independent(p)
        self.reduce_ipg_grads()
        self.averaged = [*(self.averaged or self.of_rank), *self._zeros()]
        self.of_rank = []  # later ones have been added to the first
        self.others.clear()
        self.buffers.clear()

    def _zeros(self) -> list[OfRank]:
        """`get_all_grad_tensors`: zeros for parameters of the rank that got no gradient; those of a later backward are added to
        the first ones, group by group."""
        idle = [] if self.offloads else [slot for key, slot in self.slots.items() if key not in self.order]
        if not self.has_zeros:
            self.has_zeros = True
            return [(slot.group, zeros) for slot in idle for zeros in self._zeros_for(slot)]
        for number, _ in enumerate(self.masters if idle else ()):
            _added = [zeros for slot in idle if slot.group == number for zeros in self._zeros_for(slot)]
        return []

    def _zeros_for(self, slot: Slot) -> list[Tensor]:
        """Those for all of a parameter of which a part is the rank's."""
        numel = slot.numel * (slot.of_rank(self.rank) > 0)
        return [self._new((numel,), self.dtype, "zeros for a gradient", 0, "gradients")] if self.anywhere or numel else []

    # -- step --------------------------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """`scaled_global_norm`: the norm of each gradient of the rank, cast to fp64; then the first group is flattened."""
        if self.offloads:
            return
        self._norms()
        self.norms.clear()
        self._flatten(0)

    def _norms(self) -> None:
        """The norm of each gradient."""
        for numel in filter(None, (slot.of_rank(self.rank) for slot in self.slots.values())):
            self._norm(numel, 0)

    def groups(self, trained: list[Family]) -> Iterator[list[Family]]:
        """What the optimizer steps over, group by group; nothing where it is on the host."""
        self.norms.clear()
        for number, master in enumerate(trained if not self.offloads else ()):
            if number:
                self._flatten(number)
            yield [master]
            self.flat = None

    def _flatten(self, group: int) -> None:
        """The gradients of a group in one tensor, cast to fp32. The last group's free those of the rank's partition."""
        parts = sum(slot.of_rank(self.rank) > 0 for slot in self.slots.values() if slot.group == group)
        numel = self.masters[group].numel
        flat = self._new((numel,), self.dtype, "flat gradients", 0, "gradients") if parts > 1 else None
        self.flat = self._new((numel,), "fp32", "fp32 gradients", 0, "gradients")
        del flat
        self.averaged = [(last_group, kept) for last_group, kept in self.averaged if last_group > group]
