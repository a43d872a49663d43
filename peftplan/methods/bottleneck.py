"""Bottleneck adapters as AdapterHub's `adapters` library builds them: Houlsby (two per layer) and Pfeiffer (one per layer).

h hidden_size, b bottleneck: down-projection (b, h) and (b), a non-linearity, up-projection (h, b) and (h): 2·h·b + h + b
parameters, with b = max(1, h // reduction_factor). Neither configuration adds a layer norm of its own.
Houlsby et al. 2019, arXiv 1902.00751, fig. 2 (`DoubleSeqBnConfig`): after self-attention and after the MLP.
Pfeiffer et al. 2020, arXiv 2005.00247, §3.1 (`SeqBnConfig`): after the MLP only.
Both leave cross-attention alone (`cross_adapter=False`) and reduce by 16; the embedding's invertible adapters are not counted.
Source: adapters 1.3.0, `configuration/adapter_config.py`, `methods/modeling.py` (`Adapter`), `methods/bottleneck.py`. The library
freezes the base model and the embeddings, so that a task's head trains beside the adapters.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Annotated

from pydantic import Field

from peftplan.arch.modules import Architecture, Module
from peftplan.errors import RefusedError
from peftplan.methods.adaptation import Adaptation, AddedTensor, MethodConfig
from peftplan.methods.heads import CLASSIFICATION, head_params


class BottleneckConfig(MethodConfig):
    """AdapterHub's `reduction_factor`, or the bottleneck's width itself."""

    reduction_factor: Annotated[float, Field(gt=0)] = 16
    bottleneck_size: Annotated[int, Field(ge=1, le=2**24)] | None = None


class HoulsbyConfig(BottleneckConfig):
    """AdapterHub's `DoubleSeqBnConfig`."""


class PfeifferConfig(BottleneckConfig):
    """AdapterHub's `SeqBnConfig`."""


BOTTLENECKS = ("houlsby", "pfeiffer")
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
PLACES = {"attention_adapters": ATTENTIONS, "output_adapters": MLPS}
"""Name of an adapter in a layer → the names of the module that it follows."""


def is_bottleneck(name: str) -> bool:
    """Whether a tensor belongs to an adapter, which no tuner of peft wraps."""
    return any(part in PLACES for part in name.split("."))


NORM_INSIDE = "output"
"""A part with a child of this name applies its residual and norm itself."""


def houlsby(arch: Architecture, config: HoulsbyConfig) -> Adaptation:
    """Two adapters per layer: after self-attention and after the MLP."""
    return _adapters(arch, config, ("attention_adapters", "output_adapters"))


def pfeiffer(arch: Architecture, config: PfeifferConfig) -> Adaptation:
    """One adapter per layer, after the MLP."""
    return _adapters(arch, config, ("output_adapters",))


def _adapters(arch: Architecture, config: BottleneckConfig, places: tuple[str, ...]) -> Adaptation:
    h = arch.hidden_size
    b = config.bottleneck_size or max(1, int(h // config.reduction_factor))
    stacks = _stacks(arch)
    if not stacks:
        raise RefusedError(f"method: {arch.model_type} has no stack of layers to put adapters in")
    added: list[AddedTensor] = []
    for stack, layers in stacks.items():
        for place in places:
            prefix = f"{stack}.{place}"
            added += [
                AddedTensor(f"{prefix}.adapter_down.0.weight", (b, h), layers),
                AddedTensor(f"{prefix}.adapter_down.0.bias", (b,), layers),
                AddedTensor(f"{prefix}.adapter_up.weight", (h, b), layers),
                AddedTensor(f"{prefix}.adapter_up.bias", (h,), layers),
            ]
    trained = head_params(arch, (*CLASSIFICATION, "MASKED_LM"))
    return Adaptation(added=tuple(added), trained=trained, resolved=(("bottleneck_size", b),))


def part_before(place: str, parts: Mapping[str, Container[str]]) -> str:
    """The part of a layer that an adapter follows; `parts`: the modules of the layer, each with those inside it.

    Raises RefusedError if the engines have no place for the adapter.
    """
    part = next((name for name in parts if name in PLACES[place]), None)
    if part is None or NORM_INSIDE in parts[part]:
        names = " or ".join(PLACES[place])
        raise RefusedError(
            f"method: adapters follow {names} without a norm of its own, and this model's layers have no such part; "
            "`peftplan serve` still counts them"
        )
    return part


def refuse_unplaced(arch: Architecture, adaptation: Adaptation) -> None:
    """Raise RefusedError if a layer has no part that one of its adapters could follow."""
    for stack, layers in _stacks(arch).items():
        places = [place for place in PLACES if any(t.name.startswith(f"{stack}.{place}.") for t in adaptation.added)]
        parts_of: dict[int, dict[str, set[str]]] = {layer: {} for layer in layers}
        for module in arch.modules:
            if module.layers is not None and _layer_of(module) == stack:
                part, inner, *_ = (*module.name[len(stack) + 1 :].split("."), "")
                for layer in module.layers:
                    parts_of[layer].setdefault(part, set()).add(inner)
        for parts in parts_of.values():
            for place in places:
                part_before(place, parts)


def _stacks(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name template of each stack of layers (`model.layers.{}`), and its layer indices."""
    layers_of: dict[str, set[int]] = {}
    for module in arch.modules:
        if module.layers is not None:
            layers_of.setdefault(_layer_of(module), set()).update(module.layers)
    return {name: tuple(sorted(layers)) for name, layers in layers_of.items()}


def _layer_of(module: Module) -> str:
    return module.name[: module.name.index("{}") + 2]
