"""Only named parameters train: LLaMA-Factory's `freeze`, `unfrozen_parameters` of axolotl and Spectrum; LLaMA Pro; LISA.

A pattern is searched in the name of each parameter, as transformers 5 writes it, so `^` and `$` bind it to the ends.
LLaMA-Factory takes the last layers, or the first where its number is negative (`_setup_freeze_tuning`, model/adapter.py
0.9.5); axolotl matches from the start (`freeze_layers_except`, utils/freeze.py 0.19), Spectrum too (arXiv 2406.06623).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from peftplan.arch.modules import Architecture
from peftplan.errors import InputError, RefusedError
from peftplan.methods.adaptation import Adaptation, MethodConfig, trained_params
from peftplan.methods.targets import Names

LAYERS = "{layers}"
"""What stands for the numbers of `trainable_layers` in a pattern."""


class PartialConfig(MethodConfig):
    """Which parameters train."""

    trainable: Names = (rf"\.{LAYERS}\.",)
    """Patterns searched in each parameter's name; `{layers}` stands for the layers of `trainable_layers`."""
    trainable_layers: int = Field(default=2, ge=-(2**16), le=2**16)
    """How many of the last layers `{layers}` means; a negative number counts from the first layer."""
    trainable_dtype: Literal["fp32"] | None = None
    """What the program casts those parameters to; None: they stay in the dtype of the model."""

    @model_validator(mode="after")
    def _names_layers(self) -> PartialConfig:
        if not all(self.trainable or ("",)):
            raise ValueError("trainable names at least one pattern, none of them empty")
        if "trainable_layers" in self.model_fields_set and not any(LAYERS in pattern for pattern in self.trainable or ()):
            raise ValueError(f"trainable_layers belongs to patterns with {LAYERS}")
        return self


def partial(arch: Architecture, config: PartialConfig) -> Adaptation:
    """The parameters that train. Raises InputError if no name matches."""
    patterns = [_pattern(text, _numbers(arch, config.trainable_layers)) for text in config.trainable or ()]
    trained, by_layer = [], False
    for family in trained_params(arch, arch.modules):
        name = f"{family.module}.{family.param}".lstrip(".")
        layers = tuple(
            layer for layer in family.layers or (0,) if any(p.search(name.replace("{}", str(layer))) for p in patterns)
        )
        if layers:
            trained.append(family if family.layers is None else family._replace(layers=layers))
            by_layer |= family.layers is not None and layers != family.layers
    if not trained:
        raise InputError("trainable", ", ".join(config.trainable or ()), "no parameter's name matches it")
    return Adaptation(trained=tuple(trained), by_layer=by_layer, trained_dtype=config.trainable_dtype)


def _pattern(text: str, layers: str) -> re.Pattern[str]:
    try:
        return re.compile(text.replace(LAYERS, layers))
    except re.error as error:
        raise InputError("trainable", text, f"not a regular expression where {LAYERS} stands for layers: {error}") from None


def _numbers(arch: Architecture, number: int) -> str:
    """The layers that `trainable_layers` means, as alternatives of a regular expression."""
    every = sorted({layer for module in arch.modules for layer in module.layers or ()})
    chosen = every[:-number] if number < 0 else every[max(0, len(every) - number) :]
    return f"(?:{'|'.join(map(str, chosen))})"


class LlamaProConfig(MethodConfig):
    """How many layers are added. They are copies, each behind the last layer of a group, whose output is zero at first."""

    num_new_blocks: int = Field(default=4, ge=1, le=2**10)
    num_groups: int | None = Field(default=None, ge=1, le=2**10)
    """As many layers are added as there are groups; None: `num_new_blocks`."""

    @property
    def groups(self) -> int:
        """How many layers are added."""
        return self.num_groups or self.num_new_blocks


def llama_pro(arch: Architecture, config: LlamaProConfig) -> Adaptation:
    """LLaMA Pro (Wu et al. 2024, arXiv 2401.02415): the layers that `with_new_layers` added train, and nothing else."""
    layers = sorted({layer for module in arch.modules for layer in module.layers or ()})
    every = len(layers) // config.groups
    names = "|".join(str(layer) for layer in layers if (layer + 1) % every == 0)
    return partial(arch, PartialConfig(trainable=(rf"\.(?:{names})\.",)))


def with_new_layers(model: Mapping[str, object], config: LlamaProConfig) -> dict[str, object]:
    """The config of a model with its new layers (`LLaMAPro.prepare_model`, tuners/llamapro.py, ms-swift 4.6).

    Raises RefusedError for a number of layers that cannot be divided, as the tool does.
    """
    layers = model.get("num_hidden_layers")
    if layers is None:
        raise RefusedError("method: llama-pro reads num_hidden_layers, which the model's config does not have")
    if not isinstance(layers, int) or layers < 1 or layers % config.num_new_blocks or layers % config.groups:
        raise RefusedError(f"num_new_blocks: {config.num_new_blocks} does not divide the model's {layers} layers")
    types, every = model.get("layer_types"), layers // config.groups
    grown: dict[str, object] = {**model, "num_hidden_layers": layers + config.groups}
    if isinstance(types, list):
        grown["layer_types"] = [kind for at, kind in enumerate(types) for kind in (kind,) * (2 if (at + 1) % every == 0 else 1)]
    return grown


class LisaConfig(MethodConfig):
    """How many layers train at a time, beside everything outside layers."""

    n_layers: int = Field(default=2, ge=1, le=2**10)


def lisa(arch: Architecture, config: LisaConfig) -> Adaptation:
    """LISA (Pan et al. 2024, arXiv 2403.17919): layers are drawn anew every some steps, and the others rest (axolotl 0.19.0,
    utils/callbacks/lisa.py). Drawn are the last ones here; all have trained before, and their optimizer states stay.
    Raises RefusedError for more layers than there are, as the tool does."""
    layers = {layer for module in arch.modules for layer in module.layers or ()}
    if config.n_layers > len(layers):
        raise RefusedError(f"n_layers: {config.n_layers} are more than the model's {len(layers)} layers")
    chosen = partial(arch, PartialConfig(trainable=(rf"\.{LAYERS}\.", r"^(?!.*\.\d+\.)"), trainable_layers=config.n_layers))
    return chosen._replace(rests=config.n_layers < len(layers))
