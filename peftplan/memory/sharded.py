"""Units of a model under FSDP: the parameters that are gathered and reduced together.

Each layer is a unit, and the root has what is left; the tool decides about embedding and head (`distributed.layout`). accelerate
(`fsdp2_prepare_model`) makes units of them since `versions.FSDP2_TAIL_APART`. The head is not freed after forward.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from math import prod

import peftplan.versions as versions
from peftplan.arch.modules import Architecture
from peftplan.distributed.expert_parallel import is_divided, owners, sharing
from peftplan.distributed.flat_parameters import is_in_mlp, is_wrapped, wraps_mlps
from peftplan.distributed.fsdp1 import Flat, Fsdp1, flats_of
from peftplan.distributed.fsdp2 import Fsdp2
from peftplan.distributed.layout import ACCELERATE, Layout
from peftplan.distributed.order import in_module_order
from peftplan.distributed.shards import gathered_by_torchao
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.tensor_parallel import ranks_of
from peftplan.distributed.towers import is_whole
from peftplan.distributed.units import Member, Unit
from peftplan.distributed.wrapped import is_beside_text, units_of_tower
from peftplan.dtypes import ITEMSIZE
from peftplan.job.further_tokens import STACK
from peftplan.ledger import Ledger
from peftplan.memory import float8
from peftplan.memory.flat_load import FlatShard, FlatUnits
from peftplan.memory.leaf_units import LeafUnits, is_leaf, leaves_of, parameters_of
from peftplan.memory.loaded import Loader
from peftplan.memory.model import Model
from peftplan.memory.units import EMBEDDING, FURTHER, IN_FP32, NORM, ROOT, TAIL, experts, further, in_fp32, layer, number_of
from peftplan.methods.bottleneck import is_bottleneck
from peftplan.parameters import Parameter, Parameters
from peftplan.storage.config import QuantConfig
from peftplan.tape.tensors import Parameter as TapeParameter

FLOATS = ("fp64", "fp32", "fp16", "bf16")
OF_SCANS = re.compile(r"\.(mixer|linear_attn)\.(dt_bias|A_log|D)$")
"""What Mamba 2, or a delta rule's decay, computes in fp32: a unit of its own where it is stored so (nemo_automodel 0.7.0,
models/nemotron_v3/layers.py, `NemotronV3MambaFP32Params`; models/{qwen3_next/layers,qwen3_5_moe/cp_linear_attn}.py, `SSMGate`;
components/distributed/parallelizer_utils.py, `fully_shard_by_dtype`)."""
BY_TORCHTUNE = {"tok_embeddings": EMBEDDING, "output": TAIL}
"""Names in `custom_sharded_layers` → units."""


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
    reshards = distributed.reshard_after_forward is not False and owners(distributed) == 1
    kernels = model.running.kernels
    calls_adapters = not (kernels.lora_mlp or kernels.lora_qkv or kernels.lora_o)
    groups = grouped(model.arch, full, shards, distributed, layout, calls_adapters=calls_adapters)
    keeps_last = layout.keeps_last and distributed.reshard_after_forward is None and model.arch.model_type not in FREED_LAST
    behind = next(name for name in reversed(groups) if name != TAIL and not name.startswith(FURTHER))
    last = {layer(model.arch.encoder_layers - 1), behind, FURTHER} if keeps_last else set()
    of_fsdp1 = distributed.strategy == "fsdp1"
    trained_apart = any(p.owner == "adapter" and p.trainable for p in full.all)
    ends = () if layout.ends == "root" else (TAIL,)  # torchtune frees a head that is a unit
    kept = () if layout.frees_root or _has_layers_alone(layout, distributed) else (ROOT, *ends)
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


def tied(arch: Architecture) -> bool:
    """Whether the head reads the input embedding."""
    return any(original.startswith(f"{arch.input_embedding}.") for _, original in arch.ties)


OF_MODULES = re.compile(r"^(?!.*\.experts\.).*\.lora_[AB]\.weight$|^prompt_encoder\.")
"""Tensors of an adapter that a module of their own holds, which is called; the wrapper of experts reads weights itself."""
Pairs = list[tuple[Parameter, Parameter]]
"""Parameters with what a rank holds of them."""


def grouped(
    arch: Architecture,
    full: Parameters,
    shards: Parameters,
    distributed: Distributed,
    layout: Layout,
    *,
    calls_adapters: bool = True,
    loads: bool = False,
    towers_apart: bool = True,
) -> dict[str, Pairs]:
    """Unit → its parameters, in the order in which torch finds the units: the root first.

    torchtune leaves embedding and tail to the root unless `custom_sharded_layers` names them (`shard_model`). FSDP1 may wrap MLPs
    alone (`wraps_mlps`): then layers have no units. `calls_adapters`: modules of an adapter, which are units of FSDP1, run one by
    one; a kernel that takes their weights finds them gathered with their layer. `loads`: with what every rank holds whole, which
    is loaded as if it were of the root. `towers_apart`: layers of a tower are not counted among those of the text.
    """
    pairs = {id(p): (p, shard) for p, shard in zip(full.all, shards.all, strict=True)}
    is_tied, norm = tied(arch), final_norm(arch, full) if layout.ends == "units" else None
    ends = _ends(arch, full, distributed, layout) if distributed.strategy == "fsdp2" else frozenset()
    trained = {p.name.partition("{}")[0] for p in full.all if p.trainable}
    of_towers = ((p, units_of_tower(p, distributed, layout, trained)) for p in full.all if towers_apart)
    towers = {id(p): units for p, units in of_towers if units is not None}
    layers = sorted({number for p in full.all if p.owner == "base" and id(p) not in towers for number in numbers(p, arch)})
    inner = distributed.strategy == "fsdp1" and wraps_mlps(distributed)
    adapted = any(p.owner == "adapter" for p in full.all)
    leaves = inner or (layout.leaves_apart and distributed.strategy == "fsdp2" and adapted)
    in_root: list[tuple[int, tuple[Parameter, Parameter]]] = []
    before = 0
    groups: dict[str, Pairs] = {ROOT: [], **({EMBEDDING: []} if EMBEDDING in ends and not is_tied else {})}
    named = {BY_TORCHTUNE[name] for name in distributed.custom_sharded_layers or ()}
    groups |= {EMBEDDING: []} if EMBEDDING in named else {}
    in_mlps = {id(p) for p in full.all if is_divided(p, distributed) or (inner and is_in_mlp(p))}
    divided = {number for p in full.all if id(p) in in_mlps for number in numbers(p, arch)}
    scans = {id(p) for p in full.all if "A_log" in arch.keep_in_fp32_strict and OF_SCANS.search(p.name)}
    of_scans = {number for p in full.all if id(p) in scans for number in numbers(p, arch)}
    flat = distributed.strategy == "fsdp1"
    of_modules = {id(p): p for p in full.all if flat and (inner or calls_adapters) and OF_MODULES.search(p.name)}
    of_layers = (
        (
            *(name for p in of_modules.values() if p.layers for name in leaves_of(p, (number,))),
            *([] if leaves else [layer(number)]),
            *([experts(number)] if number in divided else []),
            *([in_fp32(number)] if number in of_scans else []),
        )
        for number in layers
    )
    apart: dict[str, Pairs] = {name: [] for names in towers.values() for name in names if name != ROOT}
    groups |= apart | {name: [] for names in of_layers for name in names} | ({TAIL: []} if TAIL in ends or TAIL in named else {})
    for p in in_module_order(full):
        unshared = p.quantized and p.name.endswith("weight") and not is_sharded(*pairs[id(p)])
        if unshared or (not loads and is_whole(p, distributed)):
            continue
        if id(p) in of_modules or (leaves and p.owner == "adapter"):
            for name in leaves_of(p):
                groups.setdefault(name, []).append(pairs[id(p)])
            continue
        if p.name.startswith(STACK):
            groups.setdefault(further(p.name, divided=is_divided(p, distributed)), []).append(pairs[id(p)])
            continue
        if (unit := experts if id(p) in in_mlps else in_fp32 if id(p) in scans else None) is not None:
            for number in numbers(p, arch):
                groups[unit(number)].append(pairs[id(p)])
            continue
        if leaves and p.layers:
            in_root += [(number, pairs[id(p)]) for number in sorted(p.layers)]
            before = len(groups[ROOT]) if len(in_root) == p.copies else before
            continue
        if id(p) in towers:
            for name in towers[id(p)]:
                groups[name].append(pairs[id(p)])
            continue
        for name in _units(p, arch, None if named else norm, is_tied=is_tied) if ends or named or p.layers else (ROOT,):
            groups[name if name in groups else ROOT].append(pairs[id(p)])
    groups[ROOT][before:before] = [pair for _, pair in sorted(in_root, key=lambda row: row[0])]
    if TAIL in groups:  # accelerate names the norm first, also where the table is the embedding's (utils/fsdp_utils.py:874)
        groups[TAIL].sort(key=lambda pair: pair[0].name.rpartition(".")[0] != norm)
    return groups


def _ends(arch: Architecture, full: Parameters, distributed: Distributed, layout: Layout) -> frozenset[str]:
    """Which of embedding and tail are units: of `tables` that are not tied those that train, or whose adapter does."""
    if layout.ends == "embedding":
        return frozenset(() if tied(arch) else (EMBEDDING,))
    if layout.ends == "tables":
        tables = () if tied(arch) else ((EMBEDDING, arch.input_embedding), (TAIL, arch.output_embedding))
        return frozenset(unit for unit, table in tables if any(p.trainable and p.name.startswith(f"{table}.") for p in full.all))
    apart = layout.ends == "units" and not _has_layers_alone(layout, distributed)
    return frozenset((EMBEDDING, TAIL) if apart else ())


def _has_layers_alone(layout: Layout, distributed: Distributed) -> bool:
    """Whether accelerate's release makes units of layers alone, and frees the root as it frees them."""
    return layout is ACCELERATE and distributed.strategy == "fsdp2" and versions.FSDP2_TAIL_APART.after(distributed.accelerate)


def _units(p: Parameter, arch: Architecture, norm: str | None, *, is_tied: bool) -> Iterator[str]:
    if of_layers := numbers(p, arch):
        yield from map(layer, of_layers)
    elif arch.input_embedding and p.name.startswith(f"{arch.input_embedding}."):
        yield TAIL if is_tied else EMBEDDING
    elif p.name.startswith(f"{arch.output_embedding}.") or p.name.rpartition(".")[0] == norm:
        yield TAIL
    else:
        yield ROOT


OF_FIRST_LAYER = re.compile(r"(?:.*\.)?(?:encoder|decoder)\.block\.0\.")
"""T5's tables of relative positions, which the first layer of each stack has alone."""


def numbers(p: Parameter, arch: Architecture) -> list[int]:
    """The layers that have a parameter; those of a decoder are counted behind the encoder's."""
    of_stack = p.layers if p.layers is not None else (0,) if OF_FIRST_LAYER.match(p.name) else ()
    return [layer_number(p.name, number, arch) for number in sorted(of_stack)]


def layer_number(name: str, number: int, arch: Architecture) -> int:
    """A layer's number among those of both stacks."""
    return number + _before(name, arch)


def _before(name: str, arch: Architecture) -> int:
    """The layers of the stack before that of a parameter."""
    return arch.encoder_layers if "decoder" in name.partition("{}")[0].split(".") else 0


def final_norm(arch: Architecture, full: Parameters) -> str | None:
    """The norm behind the layers, where accelerate finds it (`_find_final_norm`): it looks for it in the attribute that
    `base_model_prefix` names, and not deeper. A PeftModel's `model` is the class with the head, which has no norm of its own,
    unless it has virtual tokens, which wrap that class once; bottleneck adapters wrap nothing.
    """
    adapted = any(p.owner == "adapter" and not (p.name.startswith("prompt_encoder.") or is_bottleneck(p.name)) for p in full.all)
    norms = [m.name for m in arch.modules if m.layers is None and "Norm" in m.kind and m.name.count(".") == 1]
    return norms[-1] if norms and not (adapted and norms[-1].startswith("model.")) else None


def is_sharded(p: Parameter, shard: Parameter) -> bool:
    """Whether a rank holds less than all of a parameter's weight."""
    return next(a.dims for a in p.allocations if a.name == "weight") != next(
        a.dims for a in shard.allocations if a.name == "weight"
    )


def _members(p: Parameter, shard: Parameter, ranks: int, dtype: str | None, *, apart: bool) -> Iterator[Member]:
    """What is gathered of a parameter: one tensor, or those of torchao's nf4."""
    wholes = gathered_by_torchao(p)
    if not wholes:
        yield _member(p, shard, ranks, dtype, apart=apart)
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
    of_unit = (model.used_in(name, None if layer is None else layer - _before(name, model.arch)) for name in names)
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
