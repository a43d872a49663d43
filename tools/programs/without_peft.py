"""Methods that peft does not have, as a program makes them: what trains, and bottlenecks behind the parts of each layer."""

from __future__ import annotations

import argparse
import re
from functools import partial
from typing import Any

import torch
from torch import nn

REDUCTION = 16
ATTENTION, MLP = "self_attn", "mlp"


class Bottleneck(nn.Module):
    """AdapterHub's adapter, which computes in its own dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(width, width // REDUCTION), nn.ReLU())
        self.adapter_up = nn.Linear(width // REDUCTION, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The hidden states with what the adapter adds."""
        inner = self.adapter_up(self.adapter_down(x.to(self.adapter_up.weight.dtype)))
        return x + inner.to(x.dtype)


def bottlenecks(job: argparse.Namespace, model: Any, *, parts: tuple[str, ...]) -> None:
    """Behind these parts of each layer, in fp32; the rest is frozen."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        for part in parts:
            adapter = Bottleneck(model.config.hidden_size)
            layer.add_module("attention_adapters" if part == ATTENTION else "output_adapters", adapter)
            getattr(layer, part).register_forward_hook(partial(behind, adapter))


def behind(adapter: Bottleneck, module: nn.Module, args: Any, output: Any) -> Any:
    """The output of a part, adapted."""
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def only(job: argparse.Namespace, model: Any) -> None:
    """Biases, or what a pattern names, or the last layers train."""
    if named := [value.removeprefix("trainable=") for value in job.set if value.startswith("trainable=")]:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(re.search(pattern, name) for pattern in named))
        return
    last = model.config.num_hidden_layers - job.trainable_layers
    for name, parameter in model.named_parameters():
        number = re.search(r"\.(\d+)\.", name)
        parameter.requires_grad_(name.endswith(".bias") if job.method == "bitfit" else bool(number and int(number[1]) >= last))


WITHOUT_PEFT = {
    "bitfit": only,
    "partial": only,
    "houlsby": partial(bottlenecks, parts=(ATTENTION, MLP)),
    "pfeiffer": partial(bottlenecks, parts=(MLP,)),
}
