"""What a rank of DeepSpeed's ZeRO stores between steps. W ranks of a shard group, N parameters, T of them trained."""

from __future__ import annotations

from functools import lru_cache
from math import prod

from peftplan.distributed.holding import FLOATS, Holding, place_of
from peftplan.distributed.order import in_module_order, tensors
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.zero import UNDECAYED, Key, by_tensor, groups_of, partition, persistence, reduce_bucket, trained_groups
from peftplan.distributed.zero3 import Sharded
from peftplan.ledger import Allocation, Category, Line, Place
from peftplan.parameters import Parameter, Parameters
from peftplan.storage import dense
from peftplan.units import ceil_div


def of_zero(parameters: Parameters, distributed: Distributed, *, autocast: str, hidden_size: int) -> Holding:
    """DeepSpeed casts the module to 16 bits, and keeps fp32 masters and states of what trains, 1/W on each rank."""
    stage_3 = distributed.strategy == "zero3"
    cast = cast_on_rank(parameters, distributed, autocast=autocast)
    place = place_of(distributed.offload_optimizer)
    if stage_3:
        masters = tuple(_masters(names, flat, place) for names, flat in _zero3_groups(parameters._replace(all=cast), distributed))
    else:
        groups = groups_of(cast, together=bool(distributed.deepspeed_optimizer))
        masters = tuple(_masters(group[0].name, partition(group, distributed.world_size), place) for group in groups)
    half = _half(cast, autocast)
    beside = _zero3_beside(cast, distributed, hidden_size, half) if stage_3 else ()
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
    if stage_3:
        frozen = tuple(_zero3_shard(p, distributed) for p in cast)
    else:
        frozen = tuple(p._replace(trainable=False) if p.trainable else p for p in cast)
    states_of = parameters._replace(all=masters) if masters else None
    on_tape: Category = "gathered_weights" if stage_3 else "gradients"
    return Holding(parameters._replace(all=frozen), (*lines, *beside), states_of, on_tape=on_tape)


def of_zero_0(parameters: Parameters, distributed: Distributed, *, autocast: str) -> Holding:
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


def sharded_of(parameters: Parameters, distributed: Distributed, hidden_size: int) -> dict[Key, Sharded]:
    """Every tensor of a model, in the order of `named_parameters()`."""
    world, most = distributed.world_size, persistence(distributed, hidden_size)
    sharded: dict[Key, Sharded] = {}
    for p, layer in tensors(in_module_order(parameters)):
        stored = next(a for a in p.allocations if a.name == "weight")
        numel, dtype = (stored.numel, stored.dtype) if p.quantized else (p.numel, p.dtype)
        sharded[p.name, layer] = Sharded(len(sharded), p.name, numel, ceil_div(numel, world), dtype, p.trainable, numel <= most)
    return sharded


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
    elements, dtype = reduce_bucket(distributed, hidden_size), distributed.reduced_in(half)
    bucket = Line("reduce bucket", "communication", dtype, (elements,), 1, "DeepSpeed, stage3.py")
    most = persistence(distributed, hidden_size)
    small = [p for p in cast if p.numel <= most and not p.quantized]
    source = "DeepSpeed, stage3.py: param_persistence_threshold"
    return (bucket, *(Line(f"{p.name} (persistent)", "gathered_weights", p.dtype, p.shape, p.copies, source) for p in small))


def cast_on_rank(parameters: Parameters, distributed: Distributed, *, autocast: str) -> tuple[Parameter, ...]:
    """The parameters as DeepSpeed leaves them: in 16 bits, but for an adapter that is added to shards, which keeps its dtype
    (runtime/engine.py, `_configure_distributed_model`)."""
    divided_first = distributed.strategy == "zero3" and by_tensor(distributed, quantized=parameters.quantized > 0)
    keeps = divided_first and not distributed.casts_adapters
    return tuple(p if keeps and p.owner == "adapter" else _in_16_bits(p, autocast) for p in parameters.all)


def _in_16_bits(p: Parameter, autocast: str) -> Parameter:
    """The parameter as `module.bfloat16()` or `.half()` leaves it; packed weights stay as they are."""
    if autocast == "none" or p.quantized or p.dtype not in FLOATS or p.dtype == autocast:
        return p
    return p._replace(dtype=autocast, allocations=dense(dtype=autocast, shape=p.shape))


def _zero3_shard(p: Parameter, distributed: Distributed) -> Parameter:
    """A rank's part of a parameter, without gradients: its master has them. Of int8 ones the layer keeps all beside it
    (bitsandbytes, nn/modules.py, `Linear8bitLt`: `state.CB`)."""
    place = place_of(distributed.offload_params)
    whole = tuple(a._replace(name="CB") for a in p.allocations if p.quantized and a.name == "weight" and a.dtype == "int8")
    sharded = tuple(
        a._replace(dims=(ceil_div(prod(a.dims), distributed.world_size),), place=place) if a.name == "weight" else a
        for a in p.allocations
    )
    return p._replace(trainable=False, allocations=(*sharded, *whole))
