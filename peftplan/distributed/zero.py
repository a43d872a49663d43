"""DeepSpeed's ZeRO: its flat groups and their partitions, its buckets, and what a rank stores of them between steps.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py, config.py; transformers, trainer.py and
integrations/deepspeed.py. W ranks, N parameters, T of them trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from peftplan.arrays import larger, smaller
from peftplan.distributed.order import in_module_order, tensors
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.zero3 import Limits
from peftplan.parameters import Parameter, Parameters
from peftplan.units import ceil_div

Key = tuple[str, int | None]
"""A tensor: its family and its layer."""
ALIGNMENT = 2
"""`nccl_start_alignment_factor`: flat groups are padded to a multiple of so many elements per rank (stage_1_and_2.py)."""
REDUCE_BUCKET, PERSISTENCE, PREFETCH_BUCKET = 500_000_000, 100_000, 50_000_000
MAX_LIVE = MAX_REUSE = SUB_GROUP = 1_000_000_000
"""DeepSpeed's own values, in elements (runtime/zero/config.py)."""
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
"""Names of parameters without weight decay, which transformers' Trainer puts into a group of their own
(`Trainer.get_decay_parameter_names`)."""


def automatic(hidden_size: int) -> dict[str, int]:
    """What transformers fills in for `auto` (integrations/deepspeed.py, `trainer_config_finalize`), in elements."""
    return {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def _elements(distributed: Distributed, name: str, own: int, hidden_size: int) -> int:
    """A field of `zero_optimization`; `own`: DeepSpeed's value where nothing is said."""
    value: int | str | None = getattr(distributed, name)
    if isinstance(value, str):
        return automatic(hidden_size)[name]
    return own if value is None else value


def reduce_bucket(distributed: Distributed, hidden_size: int) -> int:
    """Elements of the reduce bucket."""
    return _elements(distributed, "reduce_bucket_size", REDUCE_BUCKET, hidden_size)


def persistence(distributed: Distributed, hidden_size: int) -> int:
    """Parameters of at most so many elements stay whole under ZeRO-3."""
    return _elements(distributed, "stage3_param_persistence_threshold", PERSISTENCE, hidden_size)


def limits(distributed: Distributed, hidden_size: int) -> Limits:
    """What ZeRO-3 gathers ahead and keeps."""
    live, reuse = distributed.stage3_max_live_parameters, distributed.stage3_max_reuse_distance
    return Limits(
        _elements(distributed, "stage3_prefetch_bucket_size", PREFETCH_BUCKET, hidden_size),
        MAX_LIVE if live is None else live,
        MAX_REUSE if reuse is None else reuse,
    )


def gathers_ahead(distributed: Distributed, hidden_size: int) -> bool:
    """Whether ZeRO-3 gathers what later modules need while another one runs."""
    of_rank = limits(distributed, hidden_size)
    return distributed.strategy == "zero3" and of_rank.prefetch_bucket > 0 and of_rank.max_live > 0


def by_tensor(distributed: Distributed, *, quantized: bool) -> bool:
    """Whether a rank makes and divides one tensor after the other, as `from_pretrained` does under ZeRO-3 unless it quantizes.

    A quantized model is made on the meta device, outside `deepspeed.zero.Init`, whatever `zero3_init` says (transformers,
    modeling_utils.py:3820, `get_init_context`).
    """
    return not quantized and distributed.zero3_init is not False


def refused_dtypes(parameters: Parameters, distributed: Distributed, *, quantized: bool) -> str | None:
    """Why ZeRO-3 raises beside an adapter, such as one in fp32 and a copy of the head in 16 bits; None where it runs.

    A model that is loaded whole and then divided is cast to one dtype first (runtime/engine.py, `_cast_module_mixed_precision`).
    """
    offloads = distributed.offload_params not in (None, "none")
    if distributed.strategy != "zero3" or offloads or not by_tensor(distributed, quantized=quantized):
        return None
    trained = [p for p in parameters.all if p.trainable]
    dtypes = sorted({p.dtype for p in trained})
    if len(dtypes) == 1 or all(p.owner == "base" for p in trained):
        return None
    return (
        f"ZeRO-3 keeps all that trains in one buffer of one dtype, not {' and '.join(dtypes)} "
        f"(DeepSpeed, defragment in runtime/zero/utils.py); use --adapter-dtype {dtypes[0]}"
    )


def overlaps(distributed: Distributed) -> bool:
    """Whether gradients are reduced on a stream of their own while backward runs; unset it is so under ZeRO-3 alone."""
    return distributed.strategy == "zero3" if distributed.overlap_comm is None else distributed.overlap_comm


def groups_of(parameters: Iterable[Parameter], *, together: bool = False) -> list[list[Parameter]]:
    """The optimizer's parameter groups, those with weight decay first; DeepSpeed drops one that is empty. `together`: where
    DeepSpeed's config names the optimizer, it gets one group (transformers, integrations/deepspeed.py, `DummyOptim`)."""
    groups: dict[tuple[int, bool], list[Parameter]] = {}
    for p in parameters:
        if p.trainable:
            key = (0, False) if together else (p.group, bool(UNDECAYED.search(p.name)))
            groups.setdefault(key, []).append(p)
    return [groups[key] for key in sorted(groups)]


@lru_cache(maxsize=8)
def trained_groups(parameters: Parameters, distributed: Distributed) -> list[list[Key]]:
    """The sub groups of the optimizer, each with its tensors in order (`_create_fp16_sub_groups`)."""
    ordered = list(tensors(in_module_order(parameters)))
    groups: list[list[Key]] = []
    for group in groups_of(parameters.all, together=bool(distributed.deepspeed_optimizer)):
        names = {p.name for p in group}
        of_group = [(p, layer) for p, layer in ordered if p.trainable and p.name in names]
        groups += [[(p.name, layer) for p, layer in part] for part in _sub_groups(of_group, distributed)]
    return groups


def _sub_groups(
    group: list[tuple[Parameter, int | None]], distributed: Distributed
) -> Iterator[list[tuple[Parameter, int | None]]]:
    """The tensors of a group as ZeRO-3's optimizer steps over them: until a rank's parts fill a sub group (stage3.py,
    `_create_fp16_sub_groups`)."""
    most = SUB_GROUP if distributed.sub_group_size is None else distributed.sub_group_size
    world_size = distributed.world_size
    filled, numel = [], 0
    for p, layer in group:
        filled.append((p, layer))
        numel += ceil_div(p.numel, world_size)
        if numel >= most:
            yield filled
            filled, numel = [], 0
    if filled:
        yield filled


def partition(group: Iterable[Parameter], world_size: int) -> int:
    """Elements of a rank's part of a flat group under ZeRO-1 and ZeRO-2: padded, so that all parts are equal."""
    return ceil_div(sum(p.copies * p.numel for p in group), ALIGNMENT * world_size) * ALIGNMENT


class Slot(NamedTuple):
    """The place of a tensor in a flat group, in elements."""

    group: int
    start: int
    numel: int
    partition: int
    """Elements of each rank's part of the group."""

    @property
    def parts(self) -> Iterator[tuple[int, int]]:
        """(rank, elements) of each rank's part of the tensor."""
        at, end = self.start, self.start + self.numel
        while at < end:
            rank = at // self.partition
            until = min(end, (rank + 1) * self.partition)
            yield rank, until - at
            at = until

    def of_rank(self, rank: int) -> int:
        """Elements that belong to a rank."""
        first, last = rank * self.partition, (rank + 1) * self.partition
        return larger(smaller(last, self.start + self.numel) - larger(first, self.start), 0)

    @property
    def ends(self) -> tuple[int, int]:
        """The first and the last rank that have a part of the tensor."""
        return self.start // self.partition, (self.start + self.numel - 1) // self.partition


def slots_of(parameters: Parameters, distributed: Distributed) -> dict[Key, Slot]:
    """Each trained tensor's place, in the order of the optimizer's groups and of `named_parameters()`, dealt out to the ranks in
    turn under `round_robin_gradients` (`_round_robin_reorder`).
    """
    world_size = distributed.world_size
    ordered = list(tensors(in_module_order(parameters)))
    slots: dict[Key, Slot] = {}
    for number, group in enumerate(groups_of(parameters.all, together=bool(distributed.deepspeed_optimizer))):
        names, start = {p.name for p in group}, 0
        members = [(p, layer) for p, layer in ordered if p.trainable and p.name in names]
        if distributed.round_robin_gradients:
            members = [member for rank in range(world_size) for member in members[rank::world_size]]
        part = partition(group, world_size)
        for p, layer in members:
            slots[p.name, layer] = Slot(number, start, p.numel, part)
            start += p.numel
    return slots


def largest_rank(slots: Mapping[Key, Slot], *, of: Slot | None = None) -> int:
    """The rank into whose partitions the most elements reach: it keeps the gradients of all of a parameter that it shares. `of`:
    of the ranks that share this tensor.
    """
    reaching: dict[int, int] = {}
    for slot in slots.values():
        for rank, _ in slot.parts:
            reaching[rank] = reaching.get(rank, 0) + slot.numel
    ranks = sorted(reaching) if of is None else [rank for rank, _ in of.parts]
    return max(ranks, key=lambda rank: reaching[rank], default=0)


def likely_ranks(parameters: Parameters, distributed: Distributed) -> tuple[int, ...]:
    """Ranks of which one needs about the most, where the order of the buckets is not known (`zero_ranks` knows it): the first and
    the last, the one with the most gradients, and that of those that share the last tensor, whose gradient comes first.
    """
    slots = slots_of(parameters, distributed)
    last = next((slot for slot in reversed(slots.values()) if slot.group == 0), None)
    ranks = (0, distributed.world_size - 1, largest_rank(slots), largest_rank(slots, of=last))
    return tuple(dict.fromkeys(ranks))
