"""Convolutions: what they save for backward, and their gradients.

Source: torch 2.13, tools/autograd/derivatives.yaml (`convolution`): input and weight are kept whichever gradient is wanted. Left
out: cuDNN's workspaces, which its heuristics choose on the card.
"""

from __future__ import annotations

from typing import Any

from peftplan.memory.model import Model
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor


def convolution(model: Model, name: str, x: Tensor, dims: Dims) -> Tensor:
    """Call a convolution with a bias; `dims` are those of its output. Autocast runs it in its dtype."""
    f, part = model.tape, model.part(name)
    f.module = name
    weight, bias = part.weight, part.bias
    if f.autocast:
        x, weight, bias = f.cast_all(f.autocast, x, weight, bias)
    node = f.record(_convolution_backward, (x, weight, bias), x, weight, bias)
    return f.new(dims, x.dtype, "convolution", node)


def _convolution_backward(f: Tape, node: Node, saved: Any, g: Tensor) -> Any:
    return tuple(
        f.new(x.dims, g.dtype, "convolution_backward") if edge else None for x, edge in zip(saved, node.edges, strict=True)
    )
