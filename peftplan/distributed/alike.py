"""Which ranks hold the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache

from peftplan.arch.modules import Architecture
from peftplan.distributed.expert_parallel import is_divided
from peftplan.distributed.shards import holding
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.tensor_parallel import divided_dim, plans_of, rows_of, shards_of
from peftplan.parameters import Parameters

OF_EACH = ("device-map", "zero1", "zero2")
"""Strategies under which each rank keeps other tensors."""


@lru_cache(maxsize=64)
def alike(
    parameters: Parameters, distributed: Distributed, architecture: Architecture, *, autocast: str
) -> tuple[tuple[int, ...], ...]:
    """The ranks in groups whose tensors have equal shapes and are loaded alike, in order of their first ranks."""
    shape_of, groups = _shapes(parameters, distributed, architecture, autocast), dict[Hashable, list[int]]()
    for rank in range(distributed.world_size):
        reads = distributed.cpu_ram_efficient_loading is True and rank == 0
        groups.setdefault((reads, shape_of(rank)), []).append(rank)
    return tuple(map(tuple, groups.values()))


def _shapes(
    parameters: Parameters, distributed: Distributed, architecture: Architecture, autocast: str
) -> Callable[[int], Hashable]:
    """Rank → what decides its shapes."""
    if distributed.strategy in OF_EACH:
        return lambda rank: rank
    if distributed.strategy == "fsdp1":
        own = [
            holding(parameters, distributed, architecture, autocast=autocast, upcasts=False, rank=rank)
            for rank in range(distributed.shards)
        ]
        stepped = [tuple(p.shape for p in (each.states_of or each.parameters).all) for each in own]
        return lambda rank: stepped[distributed.place(rank)[0]]
    plans, parts, shards = plans_of(distributed), distributed.divided, distributed.shards
    dims = ((p, divided_dim(p, architecture, plans)) for p in parameters.all) if parts > 1 else ()
    divided = {p.shape[dim] for p, dim in dims if dim is not None}
    of_all = distributed.model_copy(update={"pp_size": None})
    whole = shards_of(parameters, architecture, of_all).all if distributed.strategy == "fsdp2" else ()
    rows = {p.shape[0] for p in whole if p.trainable and p.shape and not is_divided(p, distributed)}

    def shape_of(rank: int) -> Hashable:
        shard, part = distributed.place(rank)
        of_shard, of_part = (rows_of(n, shards, shard) for n in rows), (rows_of(n, parts, part) for n in divided)
        return distributed.stage(rank), distributed.ring(rank), *of_shard, *of_part

    return shape_of
