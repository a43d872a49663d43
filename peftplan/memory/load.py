"""The load phase: what is alive while weights reach the device, are quantized, prepared and adapted.

A dense model is moved weight by weight, so its peak is its end. A quantized one is loaded on the device: a warm-up block of the
size of all stored weights is taken and freed, then each weight arrives in the load dtype, in the natural order of names, and is
quantized there. Source: transformers, core_model_loading.py and modeling_utils.py (`caching_allocator_warmup`);
bitsandbytes, functional.py (`quantize_4bit`); peft, `prepare_model_for_kbit_training`. The trace's `trace.load`
does the same tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from math import prod

from peftplan.distributed.order import by_module, tensors
from peftplan.dtypes import ITEMSIZE, SIXTEEN_BITS
from peftplan.job.setup import Setup
from peftplan.ledger import Ledger, Line
from peftplan.memory.arriving import MADE_LATER, WARMUP_BYTES, sizes_on_device, warm_up
from peftplan.memory.dora_load import norms
from peftplan.memory.loaded import Handle, Memory
from peftplan.memory.stacked_load import Stacks, as_stored, initialize, load_stack
from peftplan.parameters import SAVED_COPY, Parameter, Parameters
from peftplan.storage import QuantConfig
from peftplan.storage.config import FOUR_BIT
from peftplan.units import round512
from peftplan.versions import named

MOVED_LAST = "boft_P"
"""BOFT's permutations, which peft leaves on the host where a model is quantized: DeepSpeed or FSDP2 moves them."""
SOURCE = f"{named('transformers')}: loading a quantized model"
Key = tuple[tuple[bool, int, str], ...]
NO_STACKS: Stacks = {}
SMALL_SEGMENT = 2 * 2**20
"""What the allocator takes for a small tensor (torch, CUDACachingAllocator.cpp, `kSmallBuffer`)."""


def dtypes_before(setup: Setup, quant: QuantConfig | None) -> tuple[str, ...]:
    """The dtypes that an adapter beside a base on the device has before its own: that of the base, or in which 4-bit layers
    compute, if it is one of 16 bits; and peft's fp32 where TRL casts it again.
    """
    base = setup.dtype if quant is None else setup.compute_dtype if quant.name in FOUR_BIT else quant.quant_storage
    if quant is not None and quant.name == "gptq":
        base = "fp16"  # of its scales (gptqmodel, `_LinearWeightMetadata.dtype`)
    narrow = (base,) if base in SIXTEEN_BITS else ()
    return (*narrow, "fp32") if setup.by.casts_adapter(setup.quant) and setup.adapter_dtype == "bf16" else narrow


def arrives_in(setup: Setup, *, full: bool) -> str:
    """The dtype in which weights reach one GPU: 16 bits where the trainer casts what trains there.

    Source: llamafactory 0.9.5, model/loader.py:155 (the checkpoint's dtype), model/adapter.py:49 (one parameter after the other).
    """
    return "bf16" if full and setup.by.widens and setup.dtype == "fp32" and setup.device_map != "none" else setup.dtype


def load_into(
    memory: Memory[Handle],
    parameters: Parameters,
    *,
    quant: QuantConfig | None,
    dtype: str,
    dtype_of: Callable[[str], str],
    prepared: bool,
    adapters_pass_in: tuple[str, ...] = (),
    moved: bool = False,
    arrives: bool = False,
    asks_for_room: bool = False,
    warms_up: bool = True,
    packed: bool = False,
    stacks: Stacks = NO_STACKS,
    workspace: int | None = None,
    recast: frozenset[str] = frozenset(),
    merged: Stacks = NO_STACKS,
) -> None:
    """Load tensor by tensor: base, buffers, what kbit preparation (`prepared`) casts, adapters. Arguments as `load_passing`.

    `arrives`: a dense base is loaded to its device as a quantized one is, by name and behind a warm-up block.
    `asks_for_room`: `device_map="auto"` puts a tensor of 8 bytes on each GPU first; the warm-up leaves out what the allocator
    kept of it (accelerate, `get_max_memory`).
    `packed`: quantized weights arrive as they are stored. `stacks`: see `stacked_load`.
    `warms_up`: whether a model loaded to its device comes behind a warm-up block.
    `workspace`: bytes of cuBLAS, which the first norm of DoRA's layers takes for good; None where they are made on the host.
    `moved`: the adapted model is moved module by module, so that what is added to a module follows it.
    `merged`: stacks of experts that are not quantized, which preparation casts.
    `recast`: names of what is cast to fp32 before kbit preparation, and back behind it (`memory.recast`).
    `adapters_pass_in`: `dtypes_before` of an adapter, one cast of all its tensors after the other (peft, tuners/tuners_utils.py,
    `_move_adapter_to_device_of_base_layer`, `_get_base_layer_device_and_dtype`, `cast_adapter_dtype`; trl `SFTTrainer.__init__`).
    """
    first, second, last = load_order(parameters, by_name=quant is not None or arrives, moved=moved and not arrives)
    if stacks or merged:
        first = sorted(first, key=lambda tensor: _key(as_stored(tensor[0], {**stacks, **merged}), tensor[1]))
    base = [p for p in parameters.all if p.owner == "base"]
    if asks_for_room:
        memory.release(memory.allocate(8))
    if quant is not None or arrives:
        if warms_up:
            block = warm_up(base, quant, dtype=dtype) - (SMALL_SEGMENT if asks_for_room else 0)
            memory.release(memory.allocate(max(0, block)))
        for a in parameters.shared:
            memory.keep((a.nbytes,))
    doubled = quant is not None and bool(quant.double_quant)
    copied = quant is not None and quant.name == "int8"  # by way of the host (bitsandbytes, `Int8Params._quantize`)
    families = {id(p): p for p, _ in (*first, *second, *last)}
    by_name = quant is not None and quant.name not in WARMUP_BYTES
    sizes_of = {key: sizes_on_device(p, by_name=by_name) for key, p in families.items()}
    arriving = {id(p): ITEMSIZE[dtype if p.quantized else dtype_of(p.name)] * p.numel for p in base}
    absmax = {id(p): _absmax_bytes(p) if doubled else 0 for p in base if p.quantized}
    widened = {id(p) for p in base if not p.quantized and _loaded(p, dtype_of(p.name)) < _bytes(p)}
    narrow: dict[tuple[str, int | None], list[Handle]] = {}
    leaving: list[Handle] = []
    for p, layer in first:
        if _on_host(p):
            leaving.append(memory.allocate(arriving[id(p)]))
        elif p.quantized and not packed:
            is_stack = p.name in stacks
            dense = load_stack(memory, p, len(stacks[p.name]), dtype) if is_stack else memory.allocate(arriving[id(p)])
            halves = [memory.allocate(ITEMSIZE["fp16"] * p.numel)] if copied else []
            _quantize_into(memory, sizes_of[id(p)], [dense, *halves], absmax=absmax[id(p)])
            if is_stack:
                memory.empty_cache()
        elif id(p) in widened or p.name in recast:
            arrived = load_stack(memory, p, len(merged.get(p.name, ())), dtype_of(p.name))
            narrow.setdefault((p.name, layer), []).append(arrived)
        else:
            memory.keep(sizes_of[id(p)])
    for p, _ in second:
        memory.keep(sizes_of[id(p)])
    for p, _ in tensors(p for p in base if p.quantized) if by_name else ():
        memory.keep(tuple(a.nbytes for a in p.allocations if a.name in MADE_LATER))
    for p in base:
        if p.name in stacks:
            initialize(memory, p, dtype=dtype, absmax=absmax[id(p)])
    tables = [(p, layer) for p, layer in tensors(base) if p.name in recast]
    for p, layer in tables:
        narrow[p.name, layer].append(memory.allocate(ITEMSIZE["fp32"] * p.numel))
        memory.release(narrow[p.name, layer].pop(0))
    for p, layer in tensors(base):
        if (p.name, layer) in narrow and p.name not in recast:
            memory.keep(sizes_of[id(p)])
            memory.release(narrow[p.name, layer].pop(0))
    if tables and prepared:
        memory.empty_cache()
    for p, layer in tables:
        memory.keep(sizes_of[id(p)])
        memory.release(narrow[p.name, layer].pop(0))
    if prepared or tables or not warms_up:  # newer releases of peft; a reader of its own behind each file
        memory.empty_cache()
    for tensor in leaving:
        memory.release(tensor)
    uncast: list[tuple[Parameter, Handle]] = []
    cast = {id(p) for p in parameters.all if _is_cast(p, adapters_pass_in)}
    of_dora = {} if workspace is None else norms(parameters, quant, dtype=dtype, passing=adapters_pass_in)
    untaken = [workspace]
    for p, _ in last:
        norm = of_dora.get(p.name)
        beside = [] if norm is None else norm.take(memory, lambda: memory.keep((untaken.pop() or 0,)) if untaken else None)
        if id(p) in cast:
            uncast.append((p, memory.allocate(ITEMSIZE[adapters_pass_in[0]] * p.numel)))
        else:
            memory.keep(sizes_of[id(p)])
        for tensor in beside:
            memory.release(tensor)
    for passing in adapters_pass_in[1:]:
        for place, (p, before) in enumerate(uncast):
            uncast[place] = p, memory.allocate(ITEMSIZE[passing] * p.numel)
            memory.release(before)
    for p, before in uncast:
        memory.keep(sizes_of[id(p)])
        memory.release(before)


def _is_cast(p: Parameter, passing: tuple[str, ...]) -> bool:
    """Whether a tensor of an adapter has other dtypes before its own. A saved copy has its original's (`cast_adapter_dtype`)."""
    of_tuner = p.owner == "adapter" and SAVED_COPY not in p.name
    return of_tuner and p.dtype in ("fp32", "bf16", "fp16") and passing[-1:] not in ((), (p.dtype,))


Tensors = list[tuple[Parameter, int | None]]
"""Tensors of families, each with its layer."""


def load_order(parameters: Parameters, *, by_name: bool, moved: bool) -> tuple[Tensors, Tensors, Tensors]:
    """What reaches the device first, what once that is there, and what when the adapters are made.

    A base that is loaded to its device arrives by name, and then its buffers. A dense model is moved module by module, each with
    its children first, then its own parameters, then its own buffers (torch, `nn/modules/module.py`, `_apply`): with its adapters
    where `moved`.
    """
    base, added = ([p for p in parameters.all if p.owner == owner] for owner in ("base", "adapter"))
    own, of_adapter = ([p for p in parameters.buffers if p.owner == owner] for owner in ("base", "adapter"))
    of_adapter = _with_first_module(of_adapter, added)
    everything = by_module(base, [*added, *of_adapter, *own])
    if moved:
        return list(tensors(everything)), [], []
    if not by_name:
        return list(tensors(by_module(base, own))), [], list(tensors(by_module(added, of_adapter)))
    buffers = {id(p) for p in (*own, *of_adapter)}
    arriving = sorted(tensors(base), key=lambda tensor: _key(*tensor))
    return arriving, list(tensors(p for p in everything if id(p) in buffers)), list(tensors(added))


def _with_first_module(buffers: list[Parameter], added: list[Parameter]) -> list[Parameter]:
    """A method's buffers, those that all its modules share (VeRA's projections) as buffers of the first module."""
    first = min(added, key=lambda p: min(p.layers or (0,)), default=None)
    if first is None:
        return buffers
    module, layers = first.name.rpartition(".")[0], first.layers and frozenset({min(first.layers)})
    return [p if "." in p.name else p._replace(name=f"{module}.{p.name}", layers=layers) for p in buffers]


def _quantize_into(memory: Memory[Handle], sizes: tuple[int, ...], temporaries: list[Handle], *, absmax: int) -> None:
    """A dense weight is quantized. Double quantization first makes its fp32 absmax, then subtracts the mean."""
    temporaries += [memory.allocate(absmax)] if absmax else []
    memory.keep(sizes[:1])
    temporaries += [memory.allocate(absmax)] if absmax else []
    memory.keep(sizes[1:])
    for number in reversed(temporaries):
        memory.release(number)


def _absmax_bytes(p: Parameter) -> int:
    """Bytes of a quantized weight's absmax in fp32; 0 where it has none on the device."""
    of_name = (a for a in p.allocations if a.place == "device" and a.name == "absmax")
    return next((ITEMSIZE["fp32"] * prod(a.dims) for a in of_name), 0)


def load_passing(
    parameters: Parameters,
    buffers: Ledger,
    *,
    dtype: str,
    dtype_of: Callable[[str], str],
    doubled: bool,
    packed: bool = False,
    adapters_pass_in: tuple[str, ...] = (),
) -> tuple[Line, ...]:
    """What the peak of loading holds beyond the tensors that last: one line, or none where the end is the peak.

    `dtype` is what quantized weights are loaded in, `dtype_of` a name what others are; `doubled`: double quantization, whose fp32
    absmax passes twice; `packed`, `adapters_pass_in`: see `load_into`.
    """
    base = [p for p in parameters.all if p.owner == "base"]
    loaded = {id(p): _loaded(p, dtype_of(p.name)) for p in base}
    once = sum(round512(a.nbytes) for a in parameters.shared)
    end = once + sum(_bytes(p) * p.copies for p in parameters.all) + buffers.bytes()
    peak = _preparing(base, loaded, buffers, once)
    if not packed:
        peak = max(peak, once + _quantizing(base, loaded, dtype=dtype, doubled=doubled))
    if adapters_pass_in:
        peak = max(peak, end + _casting(parameters, adapters_pass_in))
    return (Line("weights while loading", "temporaries", "uint8", (peak - end,), 1, SOURCE),) if peak > end else ()


def _casting(parameters: Parameters, passing: tuple[str, ...]) -> int:
    """How far the peak of casting adapters, tensor by tensor, lies above its end."""
    cast = [p for p, _ in tensors(p for p in parameters.all if _is_cast(p, passing))]
    sizes = [[round512(ITEMSIZE[dtype] * p.numel) for p in cast] for dtype in passing] + [[_bytes(p) for p in cast]]
    peak = level = sum(sizes[0])
    for before, after in pairwise(sizes):
        for old, new in zip(before, after, strict=True):
            peak = max(peak, level + new)
            level += new - old
    return peak - level


def _quantizing(base: list[Parameter], loaded: dict[int, int], *, dtype: str, doubled: bool) -> int:
    """The highest level while weights are loaded and quantized.

    Levels only grow, so of each family the last layer decides, and of its layers all tensors but some of the last come before.
    """
    places = [(_key(p, max(p.layers) if p.layers else None), p) for p in base]
    peak = 0
    for key, p in places:
        if not p.quantized:
            continue
        level = sum(_before(other, place, key) * loaded[id(other)] for place, other in places)
        temporary_bytes = round512(ITEMSIZE[dtype] * p.numel)
        if any(a.name == "SCB" for a in p.allocations):
            temporary_bytes += round512(ITEMSIZE["fp16"] * p.numel)
        absmax = next((a for a in p.allocations if a.name == "absmax"), None)
        if doubled and absmax is not None:
            temporary_bytes += 2 * round512(ITEMSIZE["fp32"] * prod(absmax.dims))
        peak = max(peak, level + temporary_bytes + _bytes(p))
    return peak


def _preparing(base: list[Parameter], loaded: dict[int, int], buffers: Ledger, once: int) -> int:
    """The highest level while kbit preparation makes fp32 copies, one weight after the other."""
    level = once + buffers.bytes() + sum(p.copies * loaded[id(p)] for p in base)
    peak = level
    for p, _ in tensors(p for p in base if _bytes(p) > loaded[id(p)]):
        peak = max(peak, level + _bytes(p))
        level += _bytes(p) - loaded[id(p)]
    return peak


def _bytes(p: Parameter) -> int:
    return sum(round512(a.nbytes) for a in p.allocations if a.place == "device")


def _loaded(p: Parameter, dtype: str) -> int:
    """Bytes of one tensor after loading and quantizing, before kbit preparation casts it."""
    narrow = round512(ITEMSIZE[dtype] * p.numel)
    return _bytes(p) if p.quantized else narrow if _on_host(p) else min(_bytes(p), narrow)


def _on_host(p: Parameter) -> bool:
    """Whether a weight is moved to host memory once all are loaded."""
    return p.owner == "base" and all(a.place == "host" for a in p.allocations)


def _before(p: Parameter, last: Key, key: Key) -> int:
    """How many of a family's tensors, whose last is `last`, come before `key`."""
    if last < key:
        return p.copies
    if p.layers is None or _key(p, min(p.layers)) >= key:
        return 0
    at = p.name.split(".").index("{}")
    bound = key[at][1]  # the layer that the key belongs to
    return sum(layer < bound for layer in p.layers) + (bound in p.layers and _key(p, bound) < key)


def _key(p: Parameter, layer: int | None) -> Key:
    """`dot_natural_key`: the parts of a name, numbers by value and before words."""
    parts = _parts(p.name)
    if layer is None:
        return parts
    at = parts.index(LAYER)
    return (*parts[:at], (False, layer, str(layer)), *parts[at + 1 :])


LAYER = (True, 0, "{}")
"""The position of the layer number in a family's name."""


@cache
def _parts(name: str) -> Key:
    return tuple((not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split("."))
