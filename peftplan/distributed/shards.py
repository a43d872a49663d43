"""The tensors that one rank stores between steps: the shards of a job's parameters, and what a strategy adds to them.

W ranks of a shard group, N parameters, T of them trained. The rank with the most bytes is counted: rank 0, whose shards are full.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import prod
from typing import NamedTuple

import peftplan.versions as versions
from peftplan.arch.modules import Architecture
from peftplan.distributed.ddp import buckets
from peftplan.distributed.device_map import largest
from peftplan.distributed.order import tensors
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.tensor_parallel import rows_of, shards_of
from peftplan.distributed.zero import UNDECAYED, by_tensor, groups_of, partition, persistence, reduce_bucket, trained_groups
from peftplan.dtypes import SIXTEEN_BITS
from peftplan.ledger import Allocation, Category, Line, Place
from peftplan.parameters import Parameter, Parameters
from peftplan.storage import dense
from peftplan.units import ceil_div

FLOATS = ("fp64", "fp32", "fp16", "bf16")
GATHERED_BY_TORCHAO = ("quantized_scalers", "quantization_factor", "weight")


class Holding(NamedTuple):
    """What a rank holds: its parameters, and other lines that last from step to step."""

    parameters: Parameters
    """The parameters that the optimizer updates, which give gradients and states their shapes and dtypes, and the frozen ones."""
    beside: tuple[Line, ...] = ()
    states_of: Parameters | None = None
    """The parameters that give optimizer states their shapes, if not `parameters`."""
    each: Parameters | None = None
    """The rank's part of each parameter, where `parameters` are flat."""
    on_tape: Category = "gradients"
    """What the step makes and frees."""
    device: int | None = None
    """Of a `device_map`, the GPU that holds it; None: one of them."""
    rank: int | None = None
    """Where ranks hold unlike parts, the one that holds these; None: the one that is counted for all, or one of them."""


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
        return _of_fsdp1(parameters, distributed, autocast=autocast, rank=rank)
    if strategy == "zero0":
        return _of_zero_0(parameters, distributed, autocast=autocast)
    if strategy in ("zero1", "zero2", "zero3"):
        return _of_zero(parameters, distributed, autocast=autocast, hidden_size=architecture.hidden_size or 0)
    if strategy == "ddp":
        return Holding(parameters, buckets(parameters, distributed))
    if strategy == "tp":
        return Holding(shards_of(parameters, architecture, distributed, rank))
    return Holding(largest(parameters, distributed.world_size).parameters)


def _place(offload: str | None) -> Place:
    return "device" if offload in (None, "none") else "host"


# -- FSDP2 ---------------------------------------------------------------------------------------------------------------------


def _of_fsdp2(parameters: Parameters, distributed: Distributed, *, upcasts: bool, rank: int) -> Holding:
    """`fully_shard`: each tensor in chunks of its first dim, ⌈rows/W⌉ rows on every rank, padded (torch,
    distributed/fsdp/_fully_shard/_fsdp_param.py, `_init_sharded_param`). The optimizer sees a rank's own rows without padding.
    accelerate first casts what trains to fp32, 4-bit models excepted.
    """
    place = _place(distributed.offload_params)
    shards = [_fsdp2_shard(_upcast(p, distributed, upcasts=upcasts), distributed.shards, place) for p in parameters.all]
    padded = parameters._replace(all=tuple(shards))
    position, _ = distributed.place(rank) if rank else (0, 0)
    if position == 0:
        return Holding(padded)
    own = [
        shard._replace(shape=(rows_of(p.shape[0], distributed.shards, position), *p.shape[1:])) if p.shape else shard
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


def _fsdp2_shard(p: Parameter, shards: int, place: Place) -> Parameter:
    """Rank 0's shard. A 4-bit weight that is not stored in a float dtype stays whole (accelerate excludes it), and so do its
    absmax and code tables. torchao's tensors are sharded, the mean and the table excepted.
    """
    if not p.shape:
        return p
    allocations = []
    gathered = gathered_by_torchao(p)
    for a in p.allocations:
        if a in gathered or (a.name == "weight" and (not p.quantized or a.dtype in FLOATS or a.dtype == "int8")):
            a = a._replace(dims=(ceil_div(a.dims[0], shards), *a.dims[1:]), place=place)
        allocations.append(a)
    return p._replace(shape=(ceil_div(p.shape[0], shards), *p.shape[1:]), allocations=tuple(allocations))


def gathered_by_torchao(p: Parameter) -> tuple[Allocation, ...]:
    """The tensors of a weight in torchao's nf4 that ranks share out, in the order in which they are gathered; empty for others.

    Source: torchao, `NF4Tensor.fsdp_pre_all_gather`.
    """
    by_name = {a.name: a for a in p.allocations}
    if not by_name.keys() >= set(GATHERED_BY_TORCHAO):
        return ()
    return tuple(by_name[name] for name in GATHERED_BY_TORCHAO)


# -- FSDP1 ---------------------------------------------------------------------------------------------------------------------


def _of_fsdp1(parameters: Parameters, distributed: Distributed, *, autocast: str, rank: int) -> Holding:
    """One flat parameter per unit and dtype, padded to W (torch, distributed/fsdp/_flat_param.py). All of it has a gradient, and
    accelerate's fp32, if any of it trains. Under peft's wrap policy a module whose weight trains is a unit of its own.
    """
    place = _place(distributed.offload_params)
    position, _ = distributed.place(rank) if rank else (0, 0)
    trained_apart = any(p.owner == "adapter" and p.trainable for p in parameters.all)
    flats: dict[tuple[str, str, bool], list[Parameter]] = {}
    parameters_of_rank: list[Parameter] = []
    each: list[Parameter] = []
    stepped: list[Parameter] = []
    alone = {p.name for p in parameters.all if trained_apart and p.trainable and _is_wrapped(p)}
    beside = {(unit_of(p), p.layers) for p in parameters.all if p.trainable and p.name not in alone}
    for p in parameters.all:
        trained = p.trainable or (not p.quantized and (unit_of(p), p.layers) in beside)
        dtype = "fp32" if trained and autocast != "none" and p.dtype in SIXTEEN_BITS else p.dtype
        p = p if dtype == p.dtype or p.quantized else p._replace(dtype=dtype, allocations=dense(dtype=dtype, shape=p.shape))
        each.append(_part(p, distributed.shards, place))
        unit = p.name if p.name in alone else unit_of(p)
        flats.setdefault((unit, p.dtype if not p.quantized else _packed(p), trained), []).append(p)
    for (unit, dtype, trained), members in flats.items():
        flat = [*_flat(unit, dtype, members, distributed.shards, place)]
        flat[0] = flat[0]._replace(trainable=trained)
        parameters_of_rank += flat
        if trained:
            stepped += flat[:1] if distributed.use_orig_params is False else _views(flat[0], members, position)
    return Holding(
        parameters._replace(all=tuple(parameters_of_rank)),
        states_of=parameters._replace(all=tuple(stepped)),
        each=parameters._replace(all=tuple(each)),
    )


def _is_wrapped(p: Parameter) -> bool:
    """Whether peft's policy wraps the module of what trains: it asks for a weight that does (peft, utils/other.py,
    `fsdp_auto_wrap_policy`). A bias beside a frozen weight stays in its layer's unit."""
    return p.owner == "adapter" or not p.name.endswith(".bias")


def _part(p: Parameter, shards: int, place: Place) -> Parameter:
    """1/W of a tensor, as if it alone were flat."""
    return p._replace(
        allocations=tuple(
            a._replace(dims=(ceil_div(prod(a.dims), shards),), place=place) if a.name == "weight" else a for a in p.allocations
        )
    )


def unit_of(p: Parameter) -> str:
    """The unit that a parameter belongs to: its layer, or the root."""
    head, layered, _ = p.name.partition("{}")
    return head + layered if layered else "root"


def _packed(p: Parameter) -> str:
    return next(a.dtype for a in p.allocations if a.name == "weight")


def _flat(unit: str, dtype: str, members: list[Parameter], shards: int, place: Place) -> Iterable[Parameter]:
    """The shard of the flat parameter, and those members that stay whole."""
    copies = max(p.copies for p in members)
    numel = sum(_elements(p) * p.copies for p in members) // copies
    shape = (ceil_div(numel, shards),)
    first = members[0]
    flat = Allocation("weight", dtype, shape, place)
    yield first._replace(
        name=f"{first.name if len(members) == 1 else unit + '.flat_param'}",
        shape=shape,
        copies=copies,
        dtype=first.dtype if first.quantized else dtype,
        allocations=(flat,),
        quantized=False,
    )
    for p in members:
        rest = tuple(a for a in p.allocations if a.name != "weight")
        if rest and p.quantized:
            yield p._replace(shape=(0,), trainable=False, allocations=rest)


def _views(flat: Parameter, members: list[Parameter], position: int) -> Iterator[Parameter]:
    """What a rank's optimizer steps over: the parts of the tensors that lie in its shard (`use_orig_params`). Members of
    different layers are not told apart.
    """
    if len({p.copies for p in members}) > 1:
        yield flat
        return
    skipped, left = position * flat.numel if position else 0, flat.numel
    for p in members:
        before = min(p.numel, skipped)
        skipped -= before
        part = min(p.numel - before, left)
        left -= part
        if part and p.trainable:
            (stored,) = flat.allocations
            yield p._replace(shape=(part,), allocations=(stored._replace(dims=(part,)),))


def _elements(p: Parameter) -> int:
    return sum(prod(a.dims) for a in p.allocations if a.name == "weight") if p.quantized else p.numel


# -- ZeRO ----------------------------------------------------------------------------------------------------------------------


def _of_zero(parameters: Parameters, distributed: Distributed, *, autocast: str, hidden_size: int) -> Holding:
    """DeepSpeed casts the module to 16 bits, and keeps fp32 masters and states of what trains, 1/W on each rank."""
    stage_3 = distributed.strategy == "zero3"
    cast = cast_on_rank(parameters, distributed, autocast=autocast)
    place = _place(distributed.offload_optimizer)
    if stage_3:
        masters = tuple(_masters(names, flat, place) for names, flat in _zero3_groups(parameters._replace(all=cast), distributed))
    else:
        masters = tuple(_masters(group[0].name, partition(group, distributed.world_size), place) for group in groups_of(cast))
    beside: tuple[Line, ...] = ()
    if stage_3:
        beside = _zero3_beside(cast, distributed, hidden_size, _half(cast, autocast))
        cast = tuple(_zero3_shard(p, distributed) for p in cast)
    half = _half(cast, autocast)
    flat = (sum(m.numel for m in masters),)
    lines = [Line(m.name, "optimizer_states", "fp32", m.shape, 1, m.source, place) for m in masters]
    if masters and place == "device":
        lines.append(Line("16-bit gradients of the rank's partition", "gradients", half, flat, 1, "DeepSpeed"))
    elif masters:
        lines.append(Line("fp32 gradients of the rank's partition", "gradients", "fp32", flat, 1, "DeepSpeed", place))
    if masters and place == "host" and stage_3:
        lines.append(Line("grad_partitions_flat_buffer", "gradients", half, flat, 1, "DeepSpeed", place))
    if masters and place == "host" and not stage_3:
        largest = (max(p.numel for p in cast if p.trainable),)
        lines.append(Line("updated weights on their way to the device", "weights", half, flat, 1, "DeepSpeed", place))
        lines.append(Line("temp_grad_buffer_for_gpu_offload", "communication", half, largest, 1, "DeepSpeed"))
    frozen = tuple(p._replace(trainable=False) for p in cast)
    states_of = parameters._replace(all=masters) if masters else None
    on_tape: Category = "gathered_weights" if stage_3 else "gradients"
    return Holding(parameters._replace(all=frozen), (*lines, *beside), states_of, on_tape=on_tape)


def _of_zero_0(parameters: Parameters, distributed: Distributed, *, autocast: str) -> Holding:
    """DeepSpeed's stage 0: the module in 16 bits, and beside it an fp32 master of each tensor that trains
    (runtime/fp16/unfused_optimizer.py). A model in fp32 stays as it is.
    """
    if autocast == "none":
        return Holding(parameters)
    cast = parameters._replace(all=cast_on_rank(parameters, distributed, autocast=autocast))
    source = "DeepSpeed, runtime/fp16/unfused_optimizer.py: fp32_groups"
    masters = tuple(p._replace(dtype="fp32", allocations=dense(dtype="fp32", shape=p.shape)) for p in cast.all if p.trainable)
    lines = tuple(Line(f"fp32 master of {p.name}", "optimizer_states", "fp32", p.shape, p.copies, source) for p in masters)
    return Holding(cast, lines, parameters._replace(all=masters))


@lru_cache(maxsize=64)
def _zero3_groups(parameters: Parameters, distributed: Distributed) -> tuple[tuple[str, int], ...]:
    """A name of each sub group, and the elements of a rank's parts of it."""
    parts = {(p.name, layer): ceil_div(p.numel, distributed.world_size) for p, layer in tensors(parameters.all)}
    groups = trained_groups(parameters, distributed)
    return tuple((group[0][0], sum(parts[key] for key in group)) for group in groups)


def _masters(first: str, flat: int, place: Place) -> Parameter:
    """The fp32 masters of a rank's part of a group. `first`: a parameter of it."""
    names = "norms and biases" if UNDECAYED.search(first) else "what trains"
    allocation = Allocation("weight", "fp32", (flat,), place)
    name, source = f"fp32 masters of {names}", "DeepSpeed: single_partition_of_fp32_groups"
    return Parameter(name, (flat,), 1, "fp32", trainable=True, owner="base", allocations=(allocation,), source=source)


def _half(cast: tuple[Parameter, ...], autocast: str) -> str:
    """The dtype of buckets and of summed gradients."""
    return next((p.dtype for p in cast if p.trainable), "bf16") if autocast == "none" else autocast


def _zero3_beside(cast: tuple[Parameter, ...], distributed: Distributed, hidden_size: int, half: str) -> tuple[Line, ...]:
    """The reduce bucket, which exists from construction on, and the small parameters that stay gathered."""
    bucket = Line("reduce bucket", "communication", half, (reduce_bucket(distributed, hidden_size),), 1, "DeepSpeed, stage3.py")
    most = persistence(distributed, hidden_size)
    small = [p for p in cast if p.numel <= most and not p.quantized]
    source = "DeepSpeed, stage3.py: param_persistence_threshold"
    return (bucket, *(Line(f"{p.name} (persistent)", "gathered_weights", p.dtype, p.shape, p.copies, source) for p in small))


def cast_on_rank(parameters: Parameters, distributed: Distributed, *, autocast: str) -> tuple[Parameter, ...]:
    """The parameters as DeepSpeed leaves them: in 16 bits, but for an adapter that is added to shards, which keeps its dtype
    (runtime/engine.py, `_configure_distributed_model`)."""
    keeps = distributed.strategy == "zero3" and by_tensor(distributed, quantized=parameters.quantized > 0)
    return tuple(p if keeps and p.owner == "adapter" else _in_16_bits(p, autocast) for p in parameters.all)


def _in_16_bits(p: Parameter, autocast: str) -> Parameter:
    """The parameter as `module.bfloat16()` or `.half()` leaves it; packed weights stay as they are."""
    if autocast == "none" or p.quantized or p.dtype not in FLOATS or p.dtype == autocast:
        return p
    return p._replace(dtype=autocast, allocations=dense(dtype=autocast, shape=p.shape))


def _zero3_shard(p: Parameter, distributed: Distributed) -> Parameter:
    place = _place(distributed.offload_params)
    sharded = tuple(
        a._replace(dims=(ceil_div(prod(a.dims), distributed.world_size),), place=place) if a.name == "weight" else a
        for a in p.allocations
    )
    return p._replace(allocations=sharded)
