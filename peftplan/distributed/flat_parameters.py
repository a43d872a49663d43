"""FSDP1's flat parameters: one per unit and dtype, of which a rank holds 1/W (torch, distributed/fsdp/_flat_param.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

from peftplan import versions
from peftplan.distributed.holding import Holding, place_of
from peftplan.distributed.order import tensors
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.wrapped import ROOT, family_of, is_beside_text
from peftplan.dtypes import SIXTEEN_BITS
from peftplan.ledger import Allocation, Place
from peftplan.parameters import Parameter, Parameters
from peftplan.storage import dense
from peftplan.units import ceil_div

MIXTURE = "MixtralSparseMoeBlock"


def of_fsdp1(parameters: Parameters, distributed: Distributed, *, autocast: str, rank: int) -> Holding:
    """One flat parameter per unit and dtype, padded to W (torch, distributed/fsdp/_flat_param.py). All of it has a gradient, and
    accelerate's fp32, if any of it trains. Under peft's wrap policy a module whose weight trains is a unit of its own.
    """
    place = place_of(distributed.offload_params)
    position, _ = distributed.place(rank) if rank else (0, 0)
    flats: dict[tuple[str, str, bool], list[Parameter]] = {}
    parameters_of_rank: list[Parameter] = []
    stepped: list[Parameter] = []
    alone = _alone(parameters)
    for p, trained in _cast(parameters, distributed, autocast):
        unit = p.name if p.name in alone else unit_of(p, distributed)
        flats.setdefault((unit, p.dtype if not p.quantized else _packed(p), trained), []).append(p)
    loaded = {p.name: p.dtype for p in parameters.all}
    for (unit, dtype, trained), members in flats.items():
        flat = [*_flat(unit, dtype, members, distributed.shards, place, trained=trained)]
        if unit != ROOT and is_beside_text(members[0].name) and loaded[members[0].name] != dtype and place == "device":
            parameters_of_rank.append(_before_cast(flat[0], loaded[members[0].name]))
        parameters_of_rank += flat
        apart = [p._replace(copies=1) for p, _ in tensors(members)] if unit == ROOT else members
        stepped += flat[:1] if distributed.steps_flat else _views(flat[0], apart, position)
    on_rank = parameters._replace(all=tuple(parameters_of_rank))
    return Holding(on_rank, states_of=parameters._replace(all=tuple(stepped)))


def parts_of(parameters: Parameters, distributed: Distributed, *, autocast: str) -> Parameters:
    """1/W of each tensor, as if it alone were flat."""
    cast, place = _cast(parameters, distributed, autocast), place_of(distributed.offload_params)
    return parameters._replace(all=tuple(_part(p, distributed.shards, place) for p, _ in cast))


def _cast(parameters: Parameters, distributed: Distributed, autocast: str) -> Iterator[tuple[Parameter, bool]]:
    """The parameters as accelerate casts their flat ones, and whether these train."""
    beside = {id(p) for p in beside_trained(parameters, distributed)}
    upcasts = autocast != "none" and not versions.FSDP1_UPCASTS.after(distributed.accelerate)
    for p in parameters.all:
        trained = p.trainable or id(p) in beside
        if trained and upcasts and p.quantized:
            p = _packed_in(p, "fp32")
        elif trained and upcasts and p.dtype in SIXTEEN_BITS:
            p = p._replace(dtype="fp32", allocations=dense(dtype="fp32", shape=p.shape))
        yield p, trained


def beside_trained(parameters: Parameters, distributed: Distributed) -> list[Parameter]:
    """What is frozen in a unit that trains: its tensors are views of the flat parameter, so backward makes gradients of all of
    them (`_use_unsharded_views`)."""
    alone = _alone(parameters)
    units = [(p, unit_of(p, distributed)) for p in parameters.all]
    trained = {(unit, _layers(p, unit)) for p, unit in units if p.trainable and p.name not in alone}
    return [p for p, unit in units if not p.trainable and (unit, _layers(p, unit)) in trained]


def _layers(p: Parameter, unit: str) -> frozenset[int] | None:
    return None if unit == ROOT else p.layers


def _alone(parameters: Parameters) -> set[str]:
    trained_apart = any(p.owner == "adapter" and p.trainable for p in parameters.all)
    return {p.name for p in parameters.all if trained_apart and p.trainable and is_wrapped(p)}


def is_wrapped(p: Parameter) -> bool:
    """Whether peft's policy wraps the module of what trains: it asks for a weight that does (peft, utils/other.py,
    `fsdp_auto_wrap_policy`). A bias beside a frozen weight stays in its layer's unit."""
    return p.owner == "adapter" or not p.name.endswith(".bias")


def _part(p: Parameter, shards: int, place: Place) -> Parameter:
    return p._replace(
        allocations=tuple(
            a._replace(dims=(ceil_div(prod(a.dims), shards),), place=place) if a.name == "weight" else a for a in p.allocations
        )
    )


def wraps_mlps(distributed: Distributed) -> bool:
    """Whether the policy wraps mixtures of experts, not the layers that have them."""
    return distributed.transformer_cls_names_to_wrap == (MIXTURE,)


def is_in_mlp(p: Parameter) -> bool:
    """Whether a layer's MLP has a parameter."""
    return "{}.mlp." in p.name


def unit_of(p: Parameter, distributed: Distributed) -> str:
    """The unit that a parameter belongs to: its layer, or the root. Where MLPs are wrapped, that of its layer alone is one."""
    if (of_tower := family_of(p, distributed)) is not None:
        return of_tower
    head, layered, _ = p.name.partition("{}")
    return head + layered if layered and (not wraps_mlps(distributed) or is_in_mlp(p)) else ROOT


def _packed(p: Parameter) -> str:
    return next(a.dtype for a in p.allocations if a.name == "weight")


def _packed_in(p: Parameter, dtype: str) -> Parameter:
    """Packed weights whose numbers are cast, as accelerate casts a flat parameter that trains."""
    return p._replace(allocations=tuple(a._replace(dtype=dtype) if a.name == "weight" else a for a in p.allocations))


def _flat(unit: str, dtype: str, members: list[Parameter], shards: int, place: Place, *, trained: bool) -> Iterable[Parameter]:
    """The shard of the flat parameter, and those members that stay whole."""
    copies = 1 if unit == ROOT else max(p.copies for p in members)
    numel = sum(_elements(p) * p.copies for p in members) // copies
    shape = (ceil_div(numel, shards),)
    first = members[0]
    flat = Allocation("weight", dtype, shape, place)
    yield first._replace(
        name=f"{first.name if len(members) == 1 else unit + '.flat_param'}",
        shape=shape,
        copies=copies,
        dtype=first.dtype if first.quantized else dtype,
        trainable=trained,
        allocations=(flat,),
        quantized=False,
    )
    for p in members:
        rest = tuple(a for a in p.allocations if a.name != "weight")
        if rest and p.quantized:
            yield p._replace(shape=(0,), trainable=False, allocations=rest)


def _before_cast(flat: Parameter, dtype: str) -> Parameter:
    """The shard of a unit that no text runs, as it was loaded: modules' own tensors stay views of it (`_use_sharded_views`)."""
    allocations = tuple(a._replace(dtype=dtype) for a in flat.allocations)
    return flat._replace(name=f"{flat.name}, before it is cast", dtype=dtype, trainable=False, allocations=allocations)


def _views(flat: Parameter, members: list[Parameter], position: int) -> Iterator[Parameter]:
    """What a rank's optimizer steps over, or makes states of: the parts of the tensors that lie in its shard (`use_orig_params`).
    Members of different layers are not told apart.
    """
    if len({p.copies for p in members}) > 1:
        yield flat
        return
    skipped, left = position * flat.numel if position else 0, flat.numel
    for p in members:
        numel = _elements(p)
        before = min(numel, skipped)
        skipped -= before
        part = min(numel - before, left)
        left -= part
        (stored,) = flat.allocations
        view = p._replace(shape=(part,), allocations=(stored._replace(dims=(part,)),))
        if part and p.quantized and not flat.trainable:  # AdaLomo has states of what is frozen too
            yield view._replace(dtype=stored.dtype, quantized=False)
        elif part and not p.quantized:
            yield view


def _elements(p: Parameter) -> int:
    return sum(prod(a.dims) for a in p.allocations if a.name == "weight") if p.quantized else p.numel
