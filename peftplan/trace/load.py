"""The load phase: how weights reach the device, tensor by tensor. It decides which free blocks later allocations find.

A quantized model, or one with a device map, is loaded on the device: transformers reserves one block of the size of the stored
weights, frees it, then copies each tensor in the order of its name, and quantizes it there. A dense model is moved module by
module, with its adapters where a trainer does it; in a plain loop they come later, each in the dtype of its base, and are cast
once all are there. Source: transformers `core_model_loading.py` (`convert_and_load_state_dict_in_model`), `modeling_utils.py`
(`caching_allocator_warmup`), bitsandbytes `functional.py` (`quantize_4bit`), torch `nn/modules/module.py` (`_apply`), peft
`prepare_model_for_kbit_training`, `tuners/tuners_utils.py` (`_move_adapter_to_device_of_base_layer`, `cast_adapter_dtype`).
Left out: buffers of adapters, such as VeRA's projections, pass in the base's dtype too, and experts that are read one by one,
which `memory.load` merges: two layers of Qwen 2 MoE that axolotl loads in 4 bits reserve 17 % more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from peftplan.depth.log import Storage
from peftplan.dtypes import ITEMSIZE, parse_dtype
from peftplan.job.setup import Setup
from peftplan.ledger import Category
from peftplan.libraries.quantized import QUANT_TENSORS
from peftplan.memory.arriving import WARMUP_BYTES
from peftplan.memory.dora_load import MAGNITUDE, OF_A_LAYER, Norm
from peftplan.memory.load import SMALL_SEGMENT, arrives_in, dtypes_before
from peftplan.memory.recast import is_table
from peftplan.parameters import SAVED_COPY
from peftplan.storage import QuantConfig, category, shared
from peftplan.trace.cuda.tuner_layers import HOST_BUFFERS, LASTING, adapter_from_host, offloaded
from peftplan.trace.events.lifetimes import on_rank
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.model import Built

PASSES = "adapter before it is cast"
EMPTIED = "cache emptied"
"""The operation of a note in the log: what runs empties the allocator's cache."""
Part = tuple[str, Any, str, torch.nn.Parameter]
"""Full name, module, name within the module, parameter."""


class _Moved(NamedTuple):
    """A tensor of a dense model. `tuned`: one that peft's layers hold beside their base layer."""

    name: str
    tensor: torch.Tensor
    category: Category
    tuned: bool

    @property
    def is_adapter(self) -> bool:
        """Whether it is a parameter that peft may cast: it copies saved modules as they are, behind all that it adds."""
        return self.tuned and not self.is_copy and self.category != "buffers" and self.tensor.is_floating_point()

    @property
    def is_copy(self) -> bool:
        """Whether it is of the trainable copy of a module."""
        return SAVED_COPY in self.name


def load(
    built: Built, tracker: Tracker, setup: Setup, quant: QuantConfig | None, *, arrives: bool = False, recasts: bool = False
) -> None:
    """Register every tensor that lasts, and the temporaries of loading. `arrives`: even a dense model is loaded on the device.

    `recasts`: embedding and head of a quantized model are cast to fp32, and back (`memory.recast`).
    """
    if quant is None and setup.device_map == "none" and not arrives:
        _dense_model(built, tracker, setup)
    else:
        room = setup.device_map == "auto"
        _on_arrival(built, tracker, setup, quant, asks_for_room=room, is_here=lambda tensor: True, recasts=recasts)


def load_on_devices(built: Built, tracker: Tracker, setup: Setup, devices: int) -> None:
    """Load a dense model on several GPUs, one after the other: no GPU sees what another one loads in between."""
    for device in range(devices):
        tracker.device = device
        here = partial(_is_on, device)
        _on_arrival(built, tracker, setup, None, asks_for_room=True, is_here=here)


def _is_on(device: int, tensor: torch.Tensor) -> bool:
    return (tensor.device.index or 0) == device


def _dense_model(built: Built, tracker: Tracker, setup: Setup) -> None:
    """Move a dense model module by module. If the base is already on the device, the adapters follow it."""
    there = adapter_from_host(setup, None)
    later = []
    for part in _moved(built):
        if there and any(leaf in HOST_BUFFERS for leaf in part.name.split(".")):
            continue
        if there and (part.tuned or part.category == "adapter_weights"):
            later.append(part)
        else:
            tracker.register(part.tensor, part.category, part.name)
    passing = dtypes_before(setup, None)
    _cast(tracker, later, passing, _norms(built, setup, None, passing))
    for name, tensor in in_dicts(built):
        tracker.register(tensor, "buffers", name)


def _moved(built: Built) -> Iterator[_Moved]:
    """Every tensor in the order in which `model.to(device)` moves it: children first, then own parameters, then own buffers."""
    names = {id(parameter): name for name, parameter in built.model.named_parameters()}
    seen = {id(module.get_base_layer().weight) for module in built.model.modules() if offloaded(module)}

    def below(module: torch.nn.Module, prefix: str, *, tuned: bool) -> Iterator[_Moved]:
        tunes = isinstance(module, BaseTunerLayer)
        for leaf, child in module.named_children():
            yield from below(child, f"{prefix}{leaf}.", tuned=(tuned or tunes) and leaf != "base_layer")
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                name = names.get(id(tensor), f"{prefix}{leaf}")
                yield _Moved(name, tensor, built.owners.get(name, "buffers"), tuned or tunes)

    return below(built.model, "", tuned=False)


def _on_arrival(
    built: Built,
    tracker: Tracker,
    setup: Setup,
    quant: QuantConfig | None,
    *,
    asks_for_room: bool,
    is_here: Callable[[torch.Tensor], bool],
    recasts: bool = False,
) -> None:
    """Load each weight to the device by its name, and quantize it there. `is_here`: whether a tensor is on this device."""
    every = [part for part in _parts(built) if is_here(part[3])]
    parts = [part for part in every if built.owners[part[0]] == "weights"]
    halves: dict[str, Storage] = {}
    named = built.model.named_parameters(remove_duplicate=False)  # a tied head's table by both names
    cast = {id(parameter) for name, parameter in named if recasts and is_table(name)}
    tables = {name for name, _, _, parameter in parts if id(parameter) in cast}
    tuned = any(isinstance(module, BaseTunerLayer) for module in built.model.modules())
    dtype = arrives_in(setup, full=not tuned)
    parts.sort(key=lambda part: _natural(_base_name(built, part)))
    _warm_up(parts, tracker, dtype, quant, asks_for_room=asks_for_room)
    for a in shared(quant):
        tensor = tracker.passing(nbytes=a.nbytes, shape=a.dims, dtype=a.dtype, op="load", category="quant_state")
        tensor.name = a.name
    for name, module, leaf, parameter in parts:
        if leaf == "weight" and QUANT_TENSORS in module.__dict__:
            _quantized(tracker, name, module, dtype=setup.dtype)
        elif name in built.upcast or name in tables or dtype != setup.dtype:
            halves[name] = _dense(tracker, tuple(on_rank(parameter).shape), dtype, name=name)
        else:
            tracker.register(parameter, "weights", name)
    for name, buffer in _on_device(built, setup, quant):
        if is_here(buffer):
            tracker.register(buffer, "buffers", name)
    if recasts:
        _widen(tracker, halves, tables)
    for names in ({*halves} - tables, tables):
        for name, _, _, parameter in every:
            if name in names:
                tracker.register(parameter, "weights", name)
                tracker.end(halves[name])
        if recasts and names:
            tracker.end(_dense(tracker, (0,), "uint8", name=EMPTIED, op=EMPTIED))
    passing = dtypes_before(setup, quant) if tuned else ()
    added = [(name, parameter) for name, _, _, parameter in every if built.owners[name] == "adapter_weights"]
    moved = [_Moved(name, parameter, "adapter_weights", True) for name, parameter in added]
    _cast(tracker, sorted(moved, key=lambda part: part.is_copy), passing, _norms(built, setup, quant, passing))


def _widen(tracker: Tracker, narrow: dict[str, Storage], tables: set[str]) -> None:
    """Cast tables of 16 bits to fp32, one after the other, in place of the narrow ones."""
    for name in [name for name in narrow if name in tables]:
        before = narrow[name]
        narrow[name] = _dense(tracker, tuple(before.shape), "fp32", name=name, op="cast")
        tracker.end(before)


def _cast(tracker: Tracker, parts: list[_Moved], passing: tuple[str, ...], norms: Mapping[str, Norm]) -> None:
    """Register tensors. Parameters of an adapter have these dtypes before their own; each cast goes over all of them.

    `norms`: of DoRA's layers, by the names of their magnitudes.
    """
    waiting = [part for part in parts if passing and part.is_adapter and parse_dtype(part.tensor.dtype) != passing[-1]]
    names = {part.name for part in waiting}
    uncast: dict[str, Storage] = {}
    for part in parts:
        beside = (
            norms[part.name].take(_OnTracker(tracker, part.name), partial(tracker.multiplied, part.name))
            if part.name in norms
            else []
        )
        if part.name in names:
            uncast[part.name] = _dense(tracker, tuple(on_rank(part.tensor).shape), passing[0], name=part.name, op=PASSES)
        else:
            tracker.register(part.tensor, part.category, part.name)
        for storage in beside:
            tracker.end(storage)
    for dtype in passing[1:]:
        for part in waiting:
            after = _dense(tracker, tuple(on_rank(part.tensor).shape), dtype, name=part.name, op=PASSES)
            tracker.end(uncast[part.name])
            uncast[part.name] = after
    for part in waiting:
        tracker.register(part.tensor, part.category, part.name)
        tracker.end(uncast[part.name])


class _OnTracker:
    """A tracker as a memory that bytes are loaded into, beside a parameter of this name."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self._name = tracker, name
        self.release = tracker.end

    def allocate(self, nbytes: int) -> Storage:
        """Record bytes."""
        return _dense(self._tracker, (nbytes,), "uint8", name=self._name, op="DoRA's first norm")

    def keep(self, sizes: tuple[int, ...], /) -> None:
        """Record bytes that stay."""
        for nbytes in sizes:
            self.allocate(nbytes)

    def empty_cache(self) -> None:
        """Nothing."""


def _norms(built: Built, setup: Setup, quant: QuantConfig | None, passing: tuple[str, ...]) -> dict[str, Norm]:
    """Name of each magnitude → the norm of its layer, where the base of peft's DoRA is a linear layer."""
    of_magnitude = {}
    for name, *_ in _parts(built):
        layer = name.partition(MAGNITUDE)[0]
        if layer == name:
            continue
        tuner = built.model.get_submodule(layer)
        base, adapter = tuner.get_base_layer(), name.removesuffix(".weight").rpartition(".")[2]
        beside = base.__dict__.get(QUANT_TENSORS)
        if (beside is None and not isinstance(base, torch.nn.Linear)) or (quant is not None and quant.name not in OF_A_LAYER):
            continue
        a = tuner.lora_A[adapter].weight
        wanted = passing[0] if passing else parse_dtype(a.dtype)
        norm = Norm(base.out_features, base.in_features, a.shape[0], parse_dtype(base.weight.dtype), wanted)
        if beside is not None:
            norm = norm._replace(packed=_nbytes(base.weight), dtype="fp32")
            if quant is not None and quant.name != "int8":
                absmax = ITEMSIZE["fp32"] * beside["absmax"].numel() if "offset" in beside else 0
                norm = norm._replace(dtype=setup.dtype, state=tuple(map(_nbytes, beside.values())), absmax=absmax)
        of_magnitude[name] = norm
    return of_magnitude


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _on_device(built: Built, setup: Setup, quant: QuantConfig | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers but those that peft leaves on the host, and the tensors that its layers keep in plain dicts."""
    from_host = adapter_from_host(setup, quant)
    for name, buffer in built.model.named_buffers():
        if not from_host or not any(part in HOST_BUFFERS for part in name.split(".")):
            yield name, buffer
    yield from in_dicts(built)


def in_dicts(built: Built) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that peft's layers keep in plain dicts."""
    for prefix, module in built.model.named_modules():
        for attribute in LASTING:
            for adapter, tensor in getattr(module, attribute, {}).items():
                yield f"{prefix}.{attribute}.{adapter}", tensor


def _parts(built: Built) -> Iterator[Part]:
    """Every parameter once, in the order of `named_parameters()`, but those that a method moves to the host."""
    seen = {id(module.get_base_layer().weight) for module in built.model.modules() if offloaded(module)}
    for prefix, module in built.model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{leaf}".lstrip("."), module, leaf, parameter


def _base_name(built: Built, part: Part) -> str:
    return f"{built.names[id(part[1])]}.{part[2]}"


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """`dot_natural_key`: parts between dots, digits by value and before words."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _dense(tracker: Tracker, shape: tuple[int, ...], dtype: str, *, name: str, op: str = "load") -> Storage:
    storage = tracker.passing(nbytes=ITEMSIZE[dtype] * prod(shape), shape=shape, dtype=dtype, op=op)
    storage.name = name
    return storage


def _warm_up(parts: list[Part], tracker: Tracker, dtype: str, quant: QuantConfig | None, *, asks_for_room: bool) -> None:
    """One allocation of the bytes of all weights as they will be stored, freed at once. `device_map="auto"` puts a small tensor
    on the device first (accelerate, `get_max_memory`), and the segment that the allocator keeps of it is left out.
    """
    if asks_for_room:
        tracker.end(_dense(tracker, (1,), "int64", name="room"))
    total = float(-SMALL_SEGMENT if asks_for_room else 0)
    for _, module, leaf, parameter in parts:
        packed = leaf == "weight" and QUANT_TENSORS in module.__dict__
        numel = module.in_features * module.out_features if packed else on_rank(parameter).numel()
        total += numel * (WARMUP_BYTES[quant.name] if packed and quant is not None else ITEMSIZE[dtype])
    tracker.end(_dense(tracker, (max(0, int(total // ITEMSIZE["fp16"])),), "fp16", name="warm-up"))


def _quantized(tracker: Tracker, name: str, module: Any, *, dtype: str) -> None:
    """A dense weight arrives and is quantized. With double quantization, fp32 absmax and absmax less its mean are temporary;
    with int8 a copy in fp16."""
    prefix = name.removesuffix(".weight")
    beside = module.__dict__[QUANT_TENSORS]
    temporaries = [_dense(tracker, (module.out_features, module.in_features), dtype, name=name)]
    if "SCB" in beside:  # by way of the host
        temporaries.append(_dense(tracker, (module.out_features, module.in_features), "fp16", name=name))
    nested = "offset" in beside
    if nested:
        temporaries.append(_dense(tracker, tuple(beside["absmax"].shape), "fp32", name=name))
    tracker.register(module.weight, "weights", name)
    if nested:
        temporaries.append(_dense(tracker, tuple(beside["absmax"].shape), "fp32", name=name))
    for part, tensor in beside.items():
        tracker.register(tensor, category(part), f"{prefix}.{part}")
    for storage in reversed(temporaries):
        tracker.end(storage)
