"""Read a job from a model that a program has loaded: its config and its parameters. Duck typing; torch is not imported.

Of each parameter only name, shape, dtype and `requires_grad` are read, so a model on the meta device serves as well as one with
weights. peft's wrapper adds the config of its adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from peftplan.arch.modules import Architecture
from peftplan.dtypes import MODEL_DTYPES, parse_dtype
from peftplan.errors import InputError, PeftplanError
from peftplan.job import sources
from peftplan.job.setup import ATTENTION
from peftplan.job.sources import LoadedModel, Tensor
from peftplan.methods.adaptation import Adaptation, trained_params

CHECKPOINTING = ("is_activation_checkpointing", "is_gradient_checkpointing")
"""Attributes that say whether a model checkpoints: the current name, then an older one."""
WRAPPERS = ("base_model.model.", "base_model.")
"""Prefixes that peft puts before the base's names, the longer one first."""
INNER = (".base_layer.", ".original_module.")
"""Parts that peft inserts into the names of wrapped modules."""


class Loaded(NamedTuple):
    """A loaded model. `trained` are the names of base parameters that require gradients, `num_trainable` and `num_total` the
    counts that peft's `get_nb_trainable_parameters()` would return; `adapter` is the config in peft's wrapper.
    """

    config: dict[str, object]
    architecture: Architecture
    adapter: dict[str, object] | None
    options: dict[str, object]
    trained: frozenset[str]
    num_trainable: int
    num_total: int

    def method(self) -> str:
        """The method of a model without an adapter. Raises InputError if nothing of it trains."""
        if not self.trained:
            raise InputError(
                "model", self.architecture.model_class, "no parameter of it requires gradients; name a method or a peft_config"
            )
        return "full"

    def adaptation(self) -> Adaptation | None:
        """The parameters that train in a model without an adapter; None if all do."""
        arch, trained, by_layer = self.architecture, [], False
        for family in trained_params(arch, arch.modules):
            name = f"{family.module}.{family.param}".lstrip(".")
            layers = tuple(n for n in family.layers or () if name.replace("{}", str(n)) in self.trained)
            if layers or (family.layers is None and name in self.trained):
                trained.append(family._replace(layers=layers if family.layers is not None else None))
                by_layer |= family.layers is not None and layers != family.layers
        everything = len(trained) == len(trained_params(arch, arch.modules)) and Adaptation(trained=tuple(trained))
        whole = everything and everything.num_trainable == arch.num_parameters
        return None if whole else Adaptation(trained=tuple(trained), by_layer=by_layer)

    def differences(self, adaptation: Adaptation, *, adapted: bool) -> Iterator[str]:
        """A warning for each of the model's own counts that differs from the job's."""
        total = self.architecture.num_parameters + adaptation.num_added if adapted else self.architecture.num_parameters
        counts = ((self.num_total, total, ""), (self.num_trainable, adaptation.num_trainable, "trainable "))
        for own, counted, kind in counts if adapted else counts[:1]:
            if own != counted:
                yield f"the loaded model has {own:,} {kind}parameters, its config describes {counted:,}, which are counted"


def read(model: LoadedModel) -> Loaded:
    """Read a loaded model. Raises InputError if several adapters are active."""
    architecture = sources.load(model)
    own = _names(architecture)
    base: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        inside = _unwrapped(name)
        (base if inside in own else added)[inside if inside in own else name] = parameter
    wrapped = sources.base_of(model) is not model
    everything = [*base.values(), *(added.values() if wrapped else ())]
    return Loaded(
        config=sources.load_config(model),
        architecture=architecture,
        adapter=_active(model) if wrapped else None,
        options=_options(model, base, added),
        trained=frozenset(name for name, parameter in base.items() if parameter.requires_grad),
        num_trainable=sum(_numel(parameter) for parameter in everything if parameter.requires_grad),
        num_total=sum(map(_numel, everything)) if wrapped else sum(_numel(p) for _, p in model.named_parameters()),
    )


def _names(architecture: Architecture) -> frozenset[str]:
    return frozenset(
        f"{name}.{param}".lstrip(".")
        for module in architecture.modules
        for param, _ in architecture.owned_params(module)
        for name in module.names()
    )


def _unwrapped(name: str) -> str:
    """The name that a parameter has without peft's wrapper."""
    prefix = next((prefix for prefix in WRAPPERS if name.startswith(prefix)), "")
    name = name.removeprefix(prefix)
    for part in INNER:
        name = name.replace(part, ".")
    return name


def _active(model: object) -> dict[str, object]:
    """The fields of the config of the adapter in peft's wrapper."""
    configs: Mapping[str, object] = getattr(model, "peft_config", {})
    if len(configs) != 1:
        raise InputError("model", ", ".join(configs), "accepted: one adapter on a loaded model; delete the others first")
    from peftplan.job.ecosystem import adapter_config

    return adapter_config(next(iter(configs.values())))


def _options(model: object, base: Mapping[str, Tensor], added: Mapping[str, Tensor]) -> dict[str, object]:
    """Options of the setup that the model decides: dtypes, attention, checkpointing where it is on."""
    module, config = sources.base_of(model), sources.module_config(model)
    options: dict[str, object] = {}
    quantized = getattr(config, "quantization_config", None) is not None
    dense = _dtype(base.values())
    dtype = _short(getattr(config, "dtype", None)) if quantized else None
    options["dtype"] = dtype or dense
    if module is not model:
        options["adapter_dtype"] = _dtype(p for p in added.values() if p.requires_grad)
        options["kbit_prepare"] = dense == "fp32" and dtype != "fp32" if quantized else None
    options["device_map"] = None if quantized or hasattr(module, "hf_device_map") else "none"
    attention = getattr(config, "_attn_implementation", None)
    options["attn_implementation"] = attention if attention in ATTENTION else None
    name = next((name for name in CHECKPOINTING if hasattr(type(module), name)), CHECKPOINTING[-1])
    options["gradient_checkpointing"] = True if getattr(module, name, False) else None
    return {name: value for name, value in options.items() if value is not None}


def _dtype(parameters: Iterable[Tensor]) -> str | None:
    """The dtype that most elements have, of those that a model can be loaded in."""
    numels: dict[str, int] = {}
    for parameter in parameters:
        short = _short(parameter.dtype)
        if short is not None:
            numels[short] = numels.get(short, 0) + parameter.numel()
    return max(numels, key=lambda dtype: numels[dtype], default=None)


def _short(dtype: object) -> str | None:
    """Our name for a dtype that a model can be loaded in; None for others, such as the bytes of packed weights."""
    try:
        return parse_dtype(dtype, accepted=MODEL_DTYPES)
    except PeftplanError:
        return None


def _numel(parameter: Tensor) -> int:
    """The number of elements. bitsandbytes' packed 4-bit weights count unpacked, two per byte, as in peft."""
    storage = getattr(parameter, "quant_storage", None) if type(parameter).__name__ == "Params4bit" else None
    return int(parameter.numel()) * (1 if storage is None else 2 * storage.itemsize)
