"""Architecture + method + storage → parameters: every tensor with its shape, its bytes on the device, and whether it trains.

Counts, weights, gradients and optimizer states are sums over this one list, so two wrongs cannot cancel.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import chain, islice
from math import prod
from typing import Literal, NamedTuple

from peftplan.arch.modules import VALUE_HEAD, Architecture, Buffer, Module, Shape
from peftplan.dtypes import ITEMSIZE, parse_dtype
from peftplan.errors import RefusedError
from peftplan.ledger import Allocation, Place
from peftplan.methods.adaptation import Adaptation, AddedBuffer, AddedTensor
from peftplan.storage import FORMATS, STACKS, QuantConfig, dense, quantized_modules, shared, stored

PREPARED = ("nf4", "fp4", "int8", "fp8", "mxfp4", "awq")
"""Formats for which `prepare_model_for_kbit_training` casts what stayed in 16 bits to fp32; gptq and hqq are left as they are
(peft, utils/other.py)."""

CASTS_BIAS = ("nf4", "fp4")
"""Formats whose layers leave their bias in the compute dtype after the first forward (`Linear4bit.forward`, bitsandbytes,
nn/modules.py). Left out: int8's layers cast theirs to the dtype of their input, which `memory.quantized.linear8bit`
knows and these counts do not: 2 B per element between fp32 and 16 bits."""

PACKED_BIAS = ("gptq", "awq")
"""Formats whose layers keep their bias in fp16, as a buffer, which nothing casts, and which peft's `bias` does not train
(gptqmodel, nn_modules/qlinear/__init__.py)."""

OF_EXPERTS = {*STACKS, "ExpertsApart"}
"""Kinds of modules whose weights have three dimensions, and their biases two."""

KEPT_BY_TRL = "lora_magnitude_vector"
"""What TRL leaves in fp32 when it casts trainable parameters on a quantized base to bf16 (trl, `SFTTrainer.__init__`)."""


SAVED_COPY = ".modules_to_save."
"""What the names of trainable copies hold."""


class Parameter(NamedTuple):
    """One family of parameters: `copies` tensors of one shape, each held by the same allocations."""

    name: str
    shape: Shape
    copies: int
    dtype: str
    trainable: bool
    owner: Literal["base", "adapter"]
    allocations: tuple[Allocation, ...]
    source: str
    in_embedding: bool = False
    is_linear: bool = False
    """The `weight` of an `nn.Linear`, which `optim_target_modules` can select."""
    layers: frozenset[int] | None = None
    """The layers whose tensors these are; None outside layers."""
    quantized: bool = False
    group: int = 0
    """As in `AddedTensor`."""
    rests: bool = False
    """Whether it does not train now and has before, so that it counts as trainable and the optimizer has its states."""

    @property
    def numel(self) -> int:
        """Elements of one copy; a 4-bit weight counts its real elements."""
        return prod(self.shape)


class Parameters(NamedTuple):
    """All parameters of the adapted model, its buffers, and the tensors that all quantized weights share."""

    all: tuple[Parameter, ...]
    shared: tuple[Allocation, ...] = ()
    quantized: int = 0
    """How many base parameters are stored in the quantized format, in elements."""
    buffers: tuple[Parameter, ...] = ()

    @property
    def num_trainable(self) -> int:
        """What `get_nb_trainable_parameters()` returns first."""
        return sum(p.copies * p.numel for p in self.all if p.trainable or p.rests)

    @property
    def num_total(self) -> int:
        """What `get_nb_trainable_parameters()` returns second: base and adapter, ties once."""
        return sum(p.copies * p.numel for p in self.all)


def build(
    arch: Architecture,
    adaptation: Adaptation,
    *,
    dtype: str,
    adapter_dtype: str,
    quant: QuantConfig | None,
    kbit_prepare: bool,
    trained_dtype: str | None = None,
    cast_back: tuple[str, ...] = (),
) -> Parameters:
    """The parameters once the model is loaded, quantized, prepared and adapted, and has run forward.

    `dtype` is what the base is loaded in, `adapter_dtype` what peft leaves the adapter in, `trained_dtype` what the trainer
    casts trainable parameters to (None: no cast), `cast_back` parts of names of modules that it casts back to `dtype` once they
    are prepared. Raises RefusedError where a quantized weight would have to train.
    """
    converted = _converted_layers(arch, quant)
    _refuse_quantized_copies(adaptation, converted, quant)
    upcast = "fp32" if quant is not None and kbit_prepare and quant.name in PREPARED else None
    trained: dict[tuple[str, str], frozenset[int]] = {}  # families of other shapes may share a name, such as `merger.mlp.{}`
    for p in adaptation.trained:
        trained[p.module, p.param] = trained.get((p.module, p.param), frozenset()) | frozenset(p.layers or (0,))
    parameters: list[Parameter] = []
    quantized = 0
    for module in arch.modules:
        weight_layers = converted.get(module.name, frozenset())
        for param, shape in arch.owned_params(module):
            names = [of.rpartition(".")[0] for of in arch.names_of(f"{module.name}.{param}")] if cast_back else []
            is_back = any(part in name for part in cast_back for name in names)
            prepared = (not is_back and upcast) or loaded_dtype(arch, f"{module.name}.{param}", dtype=dtype)
            trains = trained.get((module.name, param), frozenset())
            for is_converted, is_trained, layers in _split(module.layers or (0,), weight_layers, trains):
                copies = len(layers)
                is_quantized = is_converted and len(shape) > (2 if module.kind in OF_EXPERTS else 1)
                in_buffer = is_converted and not is_quantized and quant is not None and quant.name in PACKED_BIAS
                is_trained = is_trained and not in_buffer
                held_dense = (trained_dtype if is_trained else None) or prepared
                if is_converted and quant is not None and quant.name in CASTS_BIAS and module.kind not in STACKS:
                    held_dense = str(quant.compute_dtype)
                if in_buffer:
                    held_dense = "fp16"
                if is_quantized and is_trained:
                    raise RefusedError(
                        f"{module.name}.{param} is stored as {quant and quant.name} and cannot train; use --quant none"
                    )
                quantized += copies * prod(shape) if is_quantized else 0
                parameters.append(
                    Parameter(
                        name=f"{module.name}.{param}".lstrip("."),
                        shape=shape,
                        copies=copies,
                        dtype=held_dense,
                        trainable=is_trained,
                        owner="base",
                        allocations=stored(quant, shape=shape, dtype=dtype, kind=module.kind)
                        if is_quantized
                        else dense(dtype=held_dense, shape=shape),
                        source=arch.model_class,
                        in_embedding=module.kind == "Embedding",
                        is_linear=module.kind.startswith("Linear") and param == "weight",
                        layers=layers if module.layers is not None else None,
                        quantized=is_quantized,
                        rests=adaptation.rests and not is_trained,
                    )
                )
    base_dtype = {name: p.dtype for p in parameters for name in arch.names_of(p.name)}
    fallback = upcast or dtype
    parameters += [_added(t, adapter_dtype, base_dtype, fallback=fallback, trained_dtype=trained_dtype) for t in adaptation.added]
    return Parameters(tuple(parameters), shared(quant) if quantized else (), quantized)


WITH_IMAGES = " (with images)"


def apart(built: Parameters, layers: frozenset[int], *, decoder: str) -> Parameters:
    """Families of what trains in layers of a decoder that run with images alone, which get no gradient without them, under a name
    of their own."""

    def parts(p: Parameter) -> Iterator[Parameter]:
        both = p.layers or frozenset()
        for name, its in ((p.name, both - layers), (p.name + WITH_IMAGES, both & layers)):
            if its:
                yield p._replace(name=name, copies=len(its), layers=its)

    def is_part(p: Parameter) -> bool:
        return p.trainable and p.layers is not None and not p.layers.isdisjoint(layers) and p.name.startswith(f"{decoder}.")

    split = (parts(p) if is_part(p) else (p,) for p in built.all)
    return built._replace(all=tuple(chain.from_iterable(split)))


def buffers(
    arch: Architecture, adaptation: Adaptation, *, dtype: str, adapter_dtype: str, on_host: bool
) -> tuple[Parameter, ...]:
    """Registered buffers: tensors that never train, the model's (rotary frequencies) and the method's (VeRA's shared matrices).

    `dtype` is what the model is loaded in, which some of its buffers follow; `adapter_dtype` that of the adapter. `on_host`:
    buffers that peft makes on the host stay there.
    """

    def buffer(b: Buffer | AddedBuffer, stored: str, owner: Literal["base", "adapter"], source: str) -> Parameter:
        place: Place = "host" if on_host and isinstance(b, AddedBuffer) and b.from_host else "device"
        layers = None if b.layers is None else frozenset(b.layers)
        allocation = Allocation("buffer", stored, b.shape, place)
        return Parameter(
            b.name, b.shape, 1 if layers is None else len(layers), stored, False, owner, (allocation,), source, layers=layers
        )

    own = [buffer(b, dtype if b.dtype == "model" else b.dtype, "base", arch.model_class) for b in arch.buffers]
    added = [
        buffer(b, adapter_dtype if b.dtype == "adapter" else parse_dtype(b.dtype), "adapter", "peft") for b in adaptation.buffers
    ]
    return (*own, *added)


_CONVERTED: dict[tuple[int, QuantConfig], tuple[Architecture, dict[str, frozenset[int]]]] = {}
"""What formats store of the architectures that were asked for last; each is kept, so that no other one has its id."""
CONVERTED_KEPT = 64


def _converted_layers(arch: Architecture, quant: QuantConfig | None) -> Mapping[str, frozenset[int]]:
    """module name template → the layers of it that the format stores ({0} for a module without layers)."""
    if quant is None:
        return {}
    if (kept := _CONVERTED.get((id(arch), quant))) is None:
        if len(_CONVERTED) >= CONVERTED_KEPT:
            _CONVERTED.clear()
        kept = _CONVERTED[id(arch), quant] = arch, _converted(arch, quant)
    return kept[1]


def _converted(arch: Architecture, quant: QuantConfig) -> dict[str, frozenset[int]]:
    arch = replace(arch, modules=tuple(module for module in arch.modules if module.name != VALUE_HEAD))
    # Only a user's own skip list can tell layers apart, and the last parameter where it lies inside the last layer (OPT without
    # affine norms); in every other family the first layer speaks for all.
    layered = any(char.isdigit() for pattern in quant.skip_modules or () for char in pattern)
    last = _last_module(arch).name
    apart = {module.name for module in arch.modules if layered or module.name == last}
    candidates = [
        (name, module, layer)
        for module in arch.modules
        for layer, name in islice(zip(module.layers or (0,), module.names(), strict=True), None if module.name in apart else 1)
    ]
    names = quantized_modules(
        quant,
        modules=[(name, module.kind) for name, module, _ in candidates],
        ties=dict(arch.ties),
        output_embedding=arch.output_embedding,
        last_parameter=_last_parameter(arch),
        keep_in_fp32=arch.keep_in_fp32,
        model_type=arch.model_type,
    )
    converted: dict[str, frozenset[int]] = {}
    for name, module, layer in candidates:
        if name in names:
            layers = {layer} if module.name in apart else set(module.layers or (0,))
            converted[module.name] = converted.get(module.name, frozenset()) | layers
    return converted


def _last_module(arch: Architecture) -> Module:
    """The module with the last parameter when the quantizer looks: `from_pretrained` ties weights later (`no_tie_weights`,
    transformers/modeling_utils.py), so a tied head counts.
    """
    return next(module for module in reversed(arch.modules) if module.params)


def _last_parameter(arch: Architecture) -> str:
    module = _last_module(arch)
    *_, name = module.names()
    return f"{name}.{module.params[-1][0]}"


def loaded_dtype(arch: Architecture, name: str, *, dtype: str) -> str:
    """fp32 for what a class keeps so, by its name or a part of it, else `dtype`.

    Source: `_get_dtype_plan` (transformers, modeling_utils.py): `_keep_in_fp32_modules` when loaded in fp16, the strict
    list under bf16 as well; both are searched in the name (core_model_loading.py).
    """
    in_fp32 = (*(arch.keep_in_fp32 if dtype == "fp16" else ()), *(arch.keep_in_fp32_strict if dtype != "fp32" else ()))
    return "fp32" if any(re.search(pattern, name) for pattern in in_fp32) else dtype


@lru_cache(maxsize=1024)
def _split(
    of_family: tuple[int, ...], quantized: frozenset[int], trained: frozenset[int]
) -> list[tuple[bool, bool, frozenset[int]]]:
    """Which layers of a family are (quantized, trained), for each combination that occurs."""
    every = frozenset(of_family)
    if trained.isdisjoint(every) and (quantized.isdisjoint(every) or every <= quantized):
        return [(every <= quantized, False, every)]
    groups: dict[tuple[bool, bool], list[int]] = {}
    for layer in sorted(every):
        groups.setdefault((layer in quantized, layer in trained), []).append(layer)
    return [(*key, frozenset(layers)) for key, layers in groups.items()]


def _base_name(copy: AddedTensor) -> str:
    """The name of the base parameter that a copy stands for."""
    return re.sub(r"\.(modules_to_save|ln_tuning_layers)(?=\.)", "", copy.name)


def _refuse_quantized_copies(adaptation: Adaptation, converted: Mapping[str, frozenset[int]], quant: QuantConfig | None) -> None:
    """Raise RefusedError where a trainable copy would copy a quantized module: peft raises a RuntimeError there."""
    if quant is None:
        return
    for tensor in (tensor for tensor in adaptation.added if tensor.dtype == "base"):
        module, _, param = _base_name(tensor).rpartition(".")
        layers = converted.get(module, frozenset()) & frozenset(tensor.layers or (0,))
        if param == "weight" and layers:
            has_list = FORMATS[quant.name].skip_modules
            remedy = f"add it to quant_skip_modules: {module.rpartition('.')[2]}" if has_list else "use --quant none"
            raise RefusedError(
                f"{module} is stored as {quant.name}, and a trainable copy of it (modules_to_save) cannot train; {remedy}"
            )


def _added(
    tensor: AddedTensor, adapter_dtype: str, base_dtype: Mapping[str, str], *, fallback: str, trained_dtype: str | None
) -> Parameter:
    dtype = adapter_dtype if tensor.dtype == "adapter" else base_dtype.get(_base_name(tensor), fallback)
    if trained_dtype is not None and tensor.trainable and KEPT_BY_TRL not in tensor.name:
        dtype = trained_dtype
    return Parameter(
        name=tensor.name,
        shape=tensor.shape,
        copies=tensor.copies,
        dtype=dtype,
        trainable=tensor.trainable,
        owner="adapter",
        allocations=dense(dtype=dtype, shape=tensor.shape),
        source=f"peft, {ITEMSIZE[dtype]} B per element ({dtype})",
        in_embedding=tensor.in_embedding,
        is_linear=tensor.name.endswith(("lora_A.weight", "lora_B.weight")),
        layers=None if tensor.layers is None else frozenset(tensor.layers),
        group=tensor.group,
    )
