"""The tensors that one rank stores between steps: the shards of a job's parameters, and what a strategy adds to them.

W ranks of a shard group, N parameters, T of them trained. The rank with the most bytes is counted: rank 0, whose shards are full.
"""

from __future__ import annotations

import peftplan.versions as versions
from peftplan.arch.modules import Architecture
from peftplan.distributed.ddp import buckets
from peftplan.distributed.device_map import largest
from peftplan.distributed.expert_parallel import is_divided, sharing
from peftplan.distributed.flat_parameters import of_fsdp1
from peftplan.distributed.holding import FLOATS, Holding, place_of
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.tensor_parallel import rows_of, shards_of
from peftplan.distributed.zero_shards import of_zero, of_zero_0
from peftplan.dtypes import SIXTEEN_BITS
from peftplan.ledger import Allocation, Place
from peftplan.parameters import Parameter, Parameters
from peftplan.storage import dense
from peftplan.units import ceil_div

GATHERED_BY_TORCHAO = ("quantized_scalers", "quantization_factor", "weight")


def holding(
    parameters: Parameters,
    distributed: Distributed,
    architecture: Architecture,
    *,
    autocast: str,
    upcasts: bool,
    rank: int = 0,
) -> Holding:
    """What a rank holds of these parameters. `autocast`: accelerate's `mixed_precision`; `upcasts`: where there is one,
    what trains is cast to fp32 under FSDP2. `rank`: the one that holds it; ranks of ZeRO hold as much.
    """
    strategy = distributed.strategy
    if strategy == "fsdp2":
        part = shards_of(parameters, architecture, distributed, rank)
        return _of_fsdp2(part, distributed, upcasts=upcasts and autocast != "none", rank=rank)
    if strategy == "fsdp1":
        return of_fsdp1(parameters, distributed, autocast=autocast, rank=rank)
    if strategy == "zero0":
        return of_zero_0(parameters, distributed, autocast=autocast)
    if strategy in ("zero1", "zero2", "zero3"):
        return of_zero(parameters, distributed, autocast=autocast, hidden_size=architecture.hidden_size or 0)
    if strategy == "ddp":
        return Holding(parameters, buckets(parameters, distributed))
    if strategy == "tp":
        return Holding(shards_of(parameters, architecture, distributed, rank))
    return Holding(largest(parameters, distributed.world_size).parameters)


def _of_fsdp2(parameters: Parameters, distributed: Distributed, *, upcasts: bool, rank: int) -> Holding:
    """`fully_shard`: each tensor in chunks of its first dim, ⌈rows/W⌉ rows on every rank, padded (torch,
    distributed/fsdp/_fully_shard/_fsdp_param.py, `_init_sharded_param`). The optimizer sees a rank's own rows without padding.
    accelerate first casts what trains to fp32, 4-bit models excepted.
    """
    place = place_of(distributed.offload_params)
    shards = [_fsdp2_shard(_upcast(p, distributed, upcasts=upcasts), *sharing(p, distributed), place) for p in parameters.all]
    padded = parameters._replace(all=tuple(shards))
    position, _ = distributed.place(rank) if rank else (0, 0)
    if position == 0:
        return Holding(padded)
    own = [
        shard._replace(shape=(rows_of(p.shape[0], distributed.shards, position), *p.shape[1:]))
        if p.shape and not is_divided(p, distributed)
        else shard
        for p, shard in zip(parameters.all, shards, strict=True)
    ]
    return Holding(padded, states_of=parameters._replace(all=tuple(own)))


def _upcast(p: Parameter, distributed: Distributed, *, upcasts: bool) -> Parameter:
    """The parameter after accelerate's cast to fp32, which depends on its version."""
    if not upcasts or p.dtype not in SIXTEEN_BITS or p.quantized:
        return p
    everything = versions.FSDP2_UPCASTS_ALL.after(distributed.accelerate)
    nothing = versions.FSDP2_UPCASTS_WHAT_TRAINS.after(distributed.accelerate) and not everything
    if nothing or not (everything or p.trainable):
        return p
    return p._replace(dtype="fp32", allocations=dense(dtype="fp32", shape=p.shape))


def _fsdp2_shard(p: Parameter, dim: int, shards: int, place: Place) -> Parameter:
    """Rank 0's shard. A 4-bit weight that is not stored in a float dtype stays whole (accelerate excludes it), and so do its
    absmax and code tables. torchao's tensors are sharded, the mean and the table excepted.
    """
    if not p.shape:
        return p
    allocations = []
    gathered = gathered_by_torchao(p)
    for a in p.allocations:
        if a in gathered or (a.name == "weight" and (not p.quantized or a.dtype in FLOATS or a.dtype == "int8")):
            a = Allocation(a.name, a.dtype, _part(a.dims, dim, shards), place)
        allocations.append(a)
    return p._replace(shape=_part(p.shape, dim, shards), allocations=tuple(allocations))


def _part(dims: tuple[int, ...], dim: int, shards: int) -> tuple[int, ...]:
    return (*dims[:dim], ceil_div(dims[dim], shards), *dims[dim + 1 :])


def gathered_by_torchao(p: Parameter) -> tuple[Allocation, ...]:
    """The tensors of a weight in torchao's nf4 that ranks share out, in the order in which they are gathered; empty for others.

    Source: torchao, `NF4Tensor.fsdp_pre_all_gather`.
    """
    if not p.quantized:
        return ()
    by_name = {a.name: a for a in p.allocations}
    if not by_name.keys() >= set(GATHERED_BY_TORCHAO):
        return ()
    return tuple(by_name[name] for name in GATHERED_BY_TORCHAO)
