"""Convert a model on the meta device to fake tensors: every storage has a size and a lifetime, but no memory.

The fake device is `cuda` where torch sees a card, so that its own dispatch decides, and else `cpu` with CUDA's differences
(`differences`): fake `cuda` tensors need a driver in the process as soon as autograd switches devices (torch). No kernel
runs and nothing is allocated on the card but the context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from peftplan.libraries.quantized import QUANT_TENSORS
from peftplan.trace.cuda.tuner_layers import LASTING
from peftplan.trace.events.lifetimes import on_rank

FakeOn = Literal["cpu", "auto"]


def fake_device(choice: FakeOn) -> torch.device:
    """The device of fake tensors. `auto`: CUDA if torch sees a card, else the CPU with CUDA's differences."""
    return torch.device("cuda" if choice == "auto" and torch.cuda.is_available() else "cpu")


class _Converter:
    """Remembers converted tensors and keeps them alive, so that a tied tensor stays one tensor."""

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        self.mode = mode
        self.device = device
        self.known: dict[int, tuple[torch.Tensor, Any]] = {}

    def tensor(self, tensor: torch.Tensor) -> Any:
        if id(tensor) not in self.known:
            meta = tensor.detach() if tensor.device.type == "meta" else tensor.detach().to("meta")
            self.known[id(tensor)] = (tensor, FakeTensor(self.mode, meta, self.device))
        return self.known[id(tensor)][1]

    def parameter(self, parameter: nn.Parameter) -> Any:
        if id(parameter) not in self.known:
            copy = nn.Parameter(self._like(parameter.detach()), parameter.requires_grad)
            copy.__dict__.update({k: v for k, v in parameter.__dict__.items() if not k.startswith("_")})
            self.known[id(parameter)] = (parameter, copy)
        return self.known[id(parameter)][1]

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor, or a DTensor over the fake part of a rank."""
        if (part := on_rank(tensor)) is tensor:
            return FakeTensor(self.mode, tensor.to("meta"), self.device)
        from torch.distributed.tensor import DTensor

        spec = tensor._spec  # type: ignore[attr-defined]
        return DTensor(FakeTensor(self.mode, part.to("meta"), self.device), spec, requires_grad=False)  # type: ignore[no-untyped-call]


def fake_batch(batch: dict[str, Any], mode: FakeTensorMode, device: torch.device) -> dict[str, Any]:
    """A copy of a batch. Pictures and sound are fake tensors; on the CPU indices are real ones, a few bytes per token."""
    every = device.type != "cpu"
    with _disable_current_modes():
        converter = _Converter(mode, device)
        return {
            name: (converter.tensor(value) if every or value.is_floating_point() else value.clone())
            if isinstance(value, torch.Tensor)
            else value
            for name, value in batch.items()
        }


def to_fake(model: nn.Module, mode: FakeTensorMode, device_of: Callable[[nn.Module], torch.device]) -> None:
    """Replace every parameter and buffer, and the tensors that quantized modules keep beside them, in place.

    `device_of`: a module → its device. A tied tensor is where the first module is that has it.
    """
    converter = _Converter(mode, device_of(model))
    for module in model.modules():
        converter.device = device_of(module)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = converter.parameter(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = converter.tensor(buffer)
        for attribute in LASTING:
            if attribute in module.__dict__:
                value = module.__dict__[attribute]
                value.update({name: converter.tensor(tensor) for name, tensor in value.items()})
        beside = module.__dict__.get(QUANT_TENSORS)
        if beside is not None:
            module.__dict__[QUANT_TENSORS] = {name: converter.tensor(tensor) for name, tensor in beside.items()}
