"""Which parameters of a model are a unit under FSDP: each layer's, and those of embedding and head where the tool parts them.

accelerate (`fsdp2_prepare_model`) makes units of embedding and head since `versions.FSDP2_TAIL_APART`. The root has what is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import peftplan.versions as versions
from peftplan.arch.modules import Architecture
from peftplan.distributed.expert_parallel import is_divided, owners
from peftplan.distributed.flat_parameters import is_in_mlp, wraps_mlps
from peftplan.distributed.layout import ACCELERATE, Layout
from peftplan.distributed.order import in_module_order
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.towers import is_whole
from peftplan.distributed.wrapped import units_of_tower
from peftplan.job.further_tokens import STACK
from peftplan.memory.leaf_units import leaves_of
from peftplan.memory.units import BACKBONE, EMBEDDING, ROOT, TAIL, experts, further, in_fp32, layer
from peftplan.methods.bottleneck import is_bottleneck
from peftplan.parameters import Parameter, Parameters

OF_SCANS = re.compile(r"\.(mixer|linear_attn)\.(dt_bias|A_log|D)$")
"""What Mamba 2, or a delta rule's decay, computes in fp32: a unit of its own where it is stored so (nemo_automodel 0.7.0,
models/nemotron_v3/layers.py, `NemotronV3MambaFP32Params`; models/{qwen3_next/layers,qwen3_5_moe/cp_linear_attn}.py, `SSMGate`;
components/distributed/parallelizer_utils.py, `fully_shard_by_dtype`)."""
BY_TORCHTUNE = {"tok_embeddings": EMBEDDING, "output": TAIL}
"""Names in `custom_sharded_layers` → units."""


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
    rest = BACKBONE if frees_apart(distributed) else ROOT
    groups: dict[str, Pairs] = {ROOT: [], rest: [], **({EMBEDDING: []} if EMBEDDING in ends and not is_tied else {})}
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
        for name in _units(p, arch, None if named else norm, rest, is_tied=is_tied) if ends or named or p.layers else (ROOT,):
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
        return frozenset(
            unit
            for unit, table in tables
            if frees_apart(distributed) or any(p.trainable and p.name.startswith(f"{table}.") for p in full.all)
        )
    apart = layout.ends == "units" and not has_layers_alone(layout, distributed)
    return frozenset((EMBEDDING, TAIL) if apart else ())


def frees_apart(distributed: Distributed) -> bool:
    """Whether ranks divide experts, and free after forward what they gathered, outside of stages: then the order matters in which
    tables, and the norm behind the layers, are gathered (nemo_automodel 0.7.0, components/moe/parallelizer.py, `apply_fsdp`)."""
    frees = owners(distributed) > 1 and bool(distributed.reshard_after_forward)
    return frees and distributed.pp_size in (None, 1)


def has_layers_alone(layout: Layout, distributed: Distributed) -> bool:
    """Whether accelerate's release makes units of layers alone, and frees the root as it frees them."""
    return layout is ACCELERATE and distributed.strategy == "fsdp2" and versions.FSDP2_TAIL_APART.after(distributed.accelerate)


def _units(p: Parameter, arch: Architecture, norm: str | None, rest: str, *, is_tied: bool) -> Iterator[str]:
    if of_layers := numbers(p, arch):
        yield from map(layer, of_layers)
    elif arch.input_embedding and p.name.startswith(f"{arch.input_embedding}."):
        yield TAIL if is_tied else EMBEDDING
    elif p.name.startswith(f"{arch.output_embedding}.") or p.name.rpartition(".")[0] == norm:
        yield TAIL
    else:
        yield rest


OF_FIRST_LAYER = re.compile(r"(?:.*\.)?(?:encoder|decoder)\.block\.0\.")
"""T5's tables of relative positions, which the first layer of each stack has alone."""


def numbers(p: Parameter, arch: Architecture) -> list[int]:
    """The layers that have a parameter; those of a decoder are counted behind the encoder's."""
    of_stack = p.layers if p.layers is not None else (0,) if OF_FIRST_LAYER.match(p.name) else ()
    return [layer_number(p.name, number, arch) for number in sorted(of_stack)]


def layer_number(name: str, number: int, arch: Architecture) -> int:
    """A layer's number among those of both stacks."""
    return number + layers_before(name, arch)


def layers_before(name: str, arch: Architecture) -> int:
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
    whole, part = (next((a.dims for a in each.allocations if a.name == "weight"), None) for each in (p, shard))
    return whole != part
