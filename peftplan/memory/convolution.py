"""Convolutions: what they save for backward, and their gradients.

Source: torch, tools/autograd/derivatives.yaml (`convolution`): input and weight are kept whichever gradient is wanted. Left
out: cuDNN's workspaces, which its heuristics choose on the card.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftplan.memory.model import Model
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor


def convolution(model: Model, name: str, x: Tensor, dims: Dims) -> Tensor:
    """Call a convolution with a bias; `dims` are those of its output. Autocast runs it in its dtype."""
    f, part = model.tape, model.part(name)

    def convolved(x: Tensor) -> Tensor:
        f.module = name
        weight: Operand = part.own_weight
        bias: Operand | None = part.bias
        if f.autocast:
            x, weight, bias = f.cast_all(f.autocast, x, weight, bias)
        node = f.record(_convolution_backward, (x, weight, bias), x, weight, bias)
        return f.new(dims, x.dtype, "convolution", node)

    return f.call(name, None, (part.weight, part.bias), x, convolved)


def _convolution_backward(f: Tape, node: Node, saved: Sequence[Operand], g: Tensor) -> Gradients:
    return tuple(
        f.new(x.dims, g.dtype, "convolution_backward") if edge else None for x, edge in zip(saved, node.edges, strict=True)
    )
