"""Units of a model under FSDP: the parameters that are gathered and reduced together. The head is not freed after forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from math import prod

from peftplan.distributed.expert_parallel import is_divided, owners, sharing
from peftplan.distributed.flat_parameters import is_wrapped, wraps_mlps
from peftplan.distributed.fsdp1 import Flat, Fsdp1, flats_of
from peftplan.distributed.fsdp2 import Fsdp2
from peftplan.distributed.layout import Layout
from peftplan.distributed.shards import gathered_by_torchao
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.tensor_parallel import ranks_of
from peftplan.distributed.units import Member, Unit
from peftplan.distributed.wrapped import is_beside_text
from peftplan.dtypes import ITEMSIZE
from peftplan.ledger import Ledger
from peftplan.memory import float8
from peftplan.memory.flat_load import FlatShard, FlatUnits
from peftplan.memory.leaf_units import LeafUnits, is_leaf, parameters_of
from peftplan.memory.loaded import Loader
from peftplan.memory.model import Model
from peftplan.memory.unit_groups import final_norm, grouped, has_layers_alone, layers_before, tied
from peftplan.memory.units import EMBEDDING, FURTHER, IN_FP32, NORM, ROOT, TAIL, layer, number_of
from peftplan.parameters import Parameter, Parameters
from peftplan.storage.config import QuantConfig
from peftplan.tape.tensors import Parameter as TapeParameter

FLOATS = ("fp64", "fp32", "fp16", "bf16")
FREED_LAST = ("nemotron_h",)
"""Model types that NeMo Automodel shards by a policy of their own, which does not keep the last layer (nemo_automodel 0.7.0,
components/models/nemotron_v3/parallelization.py)."""


def computing_dtype(distributed: Distributed, autocast: str, quant: QuantConfig | None = None) -> str | None:
    """The dtype in which weights are gathered and compute; None: each in its own. Under FSDP1 Trainer takes that of packed
    weights (transformers, distributed/fsdp.py, `update_fsdp_plugin_peft`). Without autocast all have that dtype: others are
    refused."""
    stored = None if quant is None or distributed.strategy != "fsdp1" or autocast == "none" else quant.quant_storage
    return stored if stored in FLOATS else distributed.param_dtype or (None if autocast == "none" else autocast)


def computing(parameters: Parameters, dtype: str | None, distributed: Distributed) -> Parameters:
    """The parameters as they are gathered; experts that a rank owns alone are in no unit, and stay as they are."""
    if dtype is None:
        return parameters

    def stays(p: Parameter) -> bool:
        alone = is_divided(p, distributed) and sharing(p, distributed)[1] == 1
        return p.quantized or p.dtype not in FLOATS or alone

    return parameters._replace(all=tuple(p if stays(p) else p._replace(dtype=dtype) for p in parameters.all))


def units_of(
    model: Model,
    full: Parameters,
    shards: Parameters,
    distributed: Distributed,
    layout: Layout,
    *,
    dtype: str | None,
    checkpoints_units: bool = False,
    kind: type[Fsdp2] = Fsdp2,
) -> Fsdp2:
    """The units of a model. `full` are its parameters, `shards` what the rank holds of each of them. `checkpoints_units`: a
    checkpointed call runs a layer as FSDP1 wraps it.
    """
    explicit = distributed.reshard_after_forward
    reshards = explicit is not False and (owners(distributed) == 1 or explicit is not None)
    kernels = model.running.kernels
    calls_adapters = not (kernels.lora_mlp or kernels.lora_qkv or kernels.lora_o)
    groups = grouped(model.arch, full, shards, distributed, layout, calls_adapters=calls_adapters)
    keeps_last = layout.keeps_last and distributed.reshard_after_forward is None and model.arch.model_type not in FREED_LAST
    behind = next(name for name in reversed(groups) if name != TAIL and not name.startswith(FURTHER))
    last = {layer(model.arch.encoder_layers - 1), behind, FURTHER} if keeps_last else set()
    of_fsdp1 = distributed.strategy == "fsdp1"
    trained_apart = any(p.owner == "adapter" and p.trainable for p in full.all)
    ends = () if layout.ends == "root" else (TAIL,)  # torchtune frees a head that is a unit
    frees_all = explicit is True and owners(distributed) > 1
    kept = () if frees_all or layout.frees_root or has_layers_alone(layout, distributed) else (ROOT, *ends)
    units = [
        Unit(
            name,
            tuple(
                member
                for p, shard in members
                for member in _members(
                    p,
                    shard,
                    sharing(p, distributed)[1],
                    "fp8_e4m3" if _in_float8(model, p) else None if name.endswith(IN_FP32) else dtype,
                    apart=of_fsdp1 and trained_apart and p.trainable and is_wrapped(p),
                )
            ),
            reshards=reshards and name not in (*kept, *last),
            ranks=sharing(members[0][0], distributed)[1] if members else distributed.shards,
            by_columns=bool(members) and sharing(members[0][0], distributed)[0] > 0,
            parameters=partial(
                parameters_of if is_leaf(name) else _parameters_of, model, name, dict.fromkeys(p.name for p, _ in members)
            ),
        )
        for name, members in groups.items()
        if not members or distributed.shards == 1 or sharing(members[0][0], distributed)[1] > 1
    ]
    model.tape.runs_on_views = of_fsdp1
    units_in_step = (Fsdp1 if of_fsdp1 else kind)(
        model.tape,
        units,
        world_size=distributed.shards,
        reduce_dtype=distributed.reduce_dtype,
        offloads=distributed.offload_params == "cpu",
        replicates=distributed.shards * ranks_of(distributed) * (distributed.pp_size or 1) != distributed.world_size,
        joined={
            **({EMBEDDING: TAIL} if tied(model.arch) else {}),
            **({NORM: TAIL} if layout.ends == "units" and final_norm(model.arch, full) else {}),
        },
    )
    if not of_fsdp1 and distributed.forward_prefetch and reshards and (distributed.pp_size or 1) == 1:
        _gather_ahead([unit for unit in units if number_of(unit.name) is not None])
    if any(map(is_leaf, groups)):
        model.tape.modules = LeafUnits(units_in_step)
    if isinstance(units_in_step, Fsdp1):
        units_in_step.views_shards = distributed.use_orig_params is not False
        inner = wraps_mlps(distributed)
        units_in_step.in_checkpoints = (inner or checkpoints_units) and model.running.reentrant and model.running.checkpointing
        units_in_step.prefetch = "none" if units_in_step.in_checkpoints else distributed.backward_prefetch or "none"
        units_in_step.prefetches_forward = bool(distributed.forward_prefetch) and not units_in_step.in_checkpoints
        model.tape.kept_inputs = [] if units_in_step.in_checkpoints and trained_apart and not inner else None
    return units_in_step


def _gather_ahead(layers: list[Unit]) -> None:
    """Gather the next layer in forward, and the two before in backward (nemo_automodel 0.7.0,
    components/distributed/parallelizer.py:759)."""
    for number, unit in enumerate(layers):
        unit.gathers_in_forward = layers[number + 1 : number + 2]
        unit.gathers_in_backward = layers[max(number - 2, 0) : number][::-1]


def _members(p: Parameter, shard: Parameter, ranks: int, dtype: str | None, *, apart: bool) -> Iterator[Member]:
    """What is gathered of a parameter: one tensor, one of each expert that Transformer Engine has apart, or those of torchao's
    nf4."""
    wholes = gathered_by_torchao(p)
    if not wholes:
        member, count = _member(p, shard, ranks, dtype, apart=apart), sum(a.name == "weight" for a in shard.allocations)
        yield from [member._replace(numel=member.numel // count)] * count
    for whole, a in zip(wholes, gathered_by_torchao(shard), strict=True):
        numel = prod(a.dims)
        yield Member(
            p.name,
            gathered=numel * ranks,
            shard=numel,
            dtype=a.dtype,
            casts=False,
            master=a.dtype,
            trainable=False,
            numel=prod(whole.dims),
            loaded=a.dtype,
            apart=apart,
        )


def _member(p: Parameter, shard: Parameter, ranks: int, dtype: str | None, *, apart: bool) -> Member:
    weight = next(a for a in shard.allocations if a.name == "weight")
    numel = prod(weight.dims)
    casts = dtype is not None and weight.dtype in FLOATS and weight.dtype != dtype
    whole = next(a for a in p.allocations if a.name == "weight") if p.quantized else None
    return Member(
        p.name,
        gathered=numel * ranks,
        shard=numel,
        dtype=dtype if casts and dtype is not None else weight.dtype,
        casts=casts,
        master=weight.dtype,
        trainable=p.trainable,
        numel=p.numel if whole is None else prod(whole.dims),
        loaded=p.dtype if whole is None else whole.dtype,
        apart=apart,
        packed=p.quantized,
    )


def _in_float8(model: Model, p: Parameter) -> bool:
    """Whether a parameter is gathered in 8 bits: the weight of a linear layer that computes in them."""
    if model.running.kernels.linear is None or not p.name.endswith(".weight"):
        return False
    module = p.name.removesuffix(".weight")
    is_linear = any(m.name == module and m.kind == "Linear" for m in model.arch.modules)
    return is_linear and float8.computes(p.shape, is_head=module == model.arch.output_embedding)


def _parameters_of(model: Model, unit: str, names: Iterable[str]) -> Iterable[TapeParameter]:
    """The parameters of a unit that the tape has used."""
    layer = number_of(unit)
    of_unit = (model.used_in(name, None if layer is None else layer - layers_before(name, model.arch)) for name in names)
    shared = (model.used_in(name, None) for name in names if layer is not None)
    return [p for p in (*of_unit, *shared) if p is not None]


def flat_units(
    model: Model, buffers: Ledger, *, accumulates: bool, whole: Loader | None, stays: Mapping[tuple[int, ...], int]
) -> FlatUnits:
    """The flat parameters of FSDP1's units, the root's last. `whole`: loads a quantized model, of which `stays` is not flat."""
    fsdp = model.units
    assert isinstance(fsdp, Fsdp1)
    ordered = [*fsdp.units[1:], fsdp.units[0]]
    flats = [_flat_shard(flat, fsdp) for unit in ordered for flat in flats_of(unit, fsdp.world_size)]
    return FlatUnits(tuple(flats), buffers, accumulates, whole, stays)


def _flat_shard(flat: Flat, fsdp: Fsdp1) -> FlatShard:
    """Loaded in the dtype of the gathered parameters, and cast to that of their shards."""
    first = flat.members[0]
    itemsize = ITEMSIZE[first.loaded]
    shard = flat.numel // fsdp.world_size
    cast = ITEMSIZE[first.master] * shard if first.loaded != first.master else 0
    return FlatShard(
        tuple(itemsize * member.numel for member in flat.members),
        itemsize * flat.numel,
        itemsize * shard,
        cast,
        fsdp.offloads,
        ITEMSIZE[first.dtype] * flat.numel,
        ITEMSIZE[first.master] * flat.numel if first.casts else 0,
        never_runs=cast > 0 and not fsdp.offloads and flat.name != f"{ROOT}.flat_param" and is_beside_text(first.name),
    )
