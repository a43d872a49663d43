"""Methods that peft does not have, as small modules inserted into the real model: Houlsby and Pfeiffer adapters, BitFit.

What is added and what trains is said by the method's own `Adaptation` (`methods/bottleneck.py`, `methods/bitfit.py`). An adapter
is `x + up(relu(down(x)))`, after self-attention or after the MLP, before the layer's own residual: adapters 1.3.0,
`methods/modeling.py` (`Adapter.forward`, `residual_before_ln`). It computes in its own dtype, as peft's layers do, and returns
its input's. Left out: layers that name these parts otherwise, and those whose norm lies inside them (BERT's `attention.output`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftplan.methods.adaptation import Adaptation
from peftplan.methods.bottleneck import part_before

FIRST_WEIGHT = ".adapter_down.0.weight"


class Bottleneck(nn.Module):
    """Down-projection, ReLU, up-projection, added to the input."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(width, bottleneck), nn.ReLU())
        self.adapter_up = nn.Linear(bottleneck, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The adapted hidden states."""
        inner = self.adapter_up(self.adapter_down(x.to(self.adapter_up.weight.dtype)))
        out: torch.Tensor = x + inner.to(x.dtype)
        return out


def apply_reference(base: nn.Module, adaptation: Adaptation, *, dtype: torch.dtype) -> nn.Module:
    """Freeze the base, unfreeze what the adaptation names, and insert its adapters. Layers that the model lacks are skipped."""
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    names = {name for name, _ in base.named_parameters()}
    for family in adaptation.trained:
        for layer in family.layers or (None,):
            name = f"{family.module}.{family.param}".lstrip(".")
            name = name if layer is None else name.replace("{}", str(layer))
            if name in names:
                parameter = base.get_parameter(name)
                parameter.requires_grad_(True)
                if adaptation.trained_dtype == "fp32":
                    parameter.data = parameter.data.float()
    modules = dict(base.named_modules())
    for tensor in adaptation.added:
        if tensor.name.endswith(FIRST_WEIGHT):
            bottleneck, width = tensor.shape
            for name in tensor.names():
                layer_name, _, place = name.removesuffix(FIRST_WEIGHT).rpartition(".")
                if layer_name in modules:
                    _insert(modules[layer_name], place, Bottleneck(width, bottleneck).to(dtype))
    return base


def _insert(layer: nn.Module, place: str, adapter: Bottleneck) -> None:
    """Insert an adapter after the part of the layer that its place names."""
    parts = {name: [inner for inner, _ in part.named_children()] for name, part in layer.named_children()}
    part = layer.get_submodule(part_before(place, parts))
    layer.add_module(place, adapter)
    part.register_forward_hook(_behind(adapter))


def _behind(adapter: Bottleneck) -> Any:
    def adapted(module: nn.Module, args: Any, output: Any) -> Any:
        return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)

    return adapted
