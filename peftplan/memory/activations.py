"""Activation functions of transformers' `ACT2FN`, written as the torch operations that they run.

Source: transformers, activations.py; torch, FunctionsManual.cpp (`pow_backward`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peftplan.errors import NeedsTraceError
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Node, Tensor

KEEP_INPUT = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "mish", "leaky_relu", "relu6", "hardswish")
KEEP_OUTPUT = ("relu", "tanh", "sigmoid")


def activation(f: Tape, x: Tensor, name: str) -> Tensor:
    """An entry of `ACT2FN`. Raises NeedsTraceError for one that has no formula."""
    if name in KEEP_INPUT:
        return ops.keeps_input(f, x, name)
    if name in KEEP_OUTPUT:
        return ops.keeps_output(f, x, name)
    if name not in COMPOSED:
        raise NeedsTraceError(f"activations of {name}")
    return COMPOSED[name](f, x)


def power(f: Tape, x: Tensor) -> Tensor:
    """`pow(x, number)`: keeps x; backward makes `grad * (exponent * x ** (exponent - 1))`. Autocast runs it in fp32."""
    if f.autocast:
        x = f.cast(x, "fp32")
    return f.new(x.dims, x.dtype, "pow", f.record(_power_backward, (x,), x))


def _power_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    raised = f.new(g.dims, g.dtype, "pow")
    scaled = f.new(g.dims, g.dtype, "mul")
    out = f.new(g.dims, g.dtype, "mul")
    del raised, scaled
    return out


def gelu_new(f: Tape, x: Tensor) -> Tensor:
    """`0.5 * x * (1 + tanh(c * (x + 0.044715 * pow(x, 3))))`: keeps x, half of x, the tanh, and one plus it."""
    half = ops.scale(f, x)
    cube = power(f, x)
    cube = ops.scale(f, cube)
    inner = ops.add(f, x, cube)
    del cube
    inner = ops.scale(f, inner)
    inner = ops.keeps_output(f, inner, "tanh")
    inner = ops.shift(f, inner)
    return ops.mul(f, half, inner)


def gelu_fast(f: Tape, x: Tensor) -> Tensor:
    """`0.5 * x * (1 + tanh(x * c * (1 + 0.044715 * x * x)))`."""
    half = ops.scale(f, x)
    scaled = ops.scale(f, x)
    square = ops.mul(f, ops.scale(f, x), x)
    inner = ops.mul(f, scaled, ops.shift(f, square))
    del scaled, square
    inner = ops.shift(f, ops.keeps_output(f, inner, "tanh"))
    return ops.mul(f, half, inner)


def quick_gelu(f: Tape, x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 * x)`."""
    gate = ops.keeps_output(f, ops.scale(f, x), "sigmoid")
    return ops.mul(f, x, gate)


def relu2(f: Tape, x: Tensor) -> Tensor:
    """`square(relu(x))`; square is `pow(x, 2)`. A name holds what it squares."""
    positive = ops.keeps_output(f, x, "relu")
    return power(f, positive)


def linear(f: Tape, x: Tensor) -> Tensor:
    """Nothing at all."""
    return x


COMPOSED: Mapping[str, Callable[[Tape, Tensor], Tensor]] = {
    "gelu_new": gelu_new,
    "gelu_accurate": gelu_new,
    "gelu_fast": gelu_fast,
    "quick_gelu": quick_gelu,
    "relu2": relu2,
    "linear": linear,
}
