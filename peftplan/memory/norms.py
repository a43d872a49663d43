"""Norms that transformers' modeling files spell out as plain operations.

Sources: transformers, models/{llama,olmo,olmo2,gemma,gemma4,nemotron,cohere}/modeling_*.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from peftplan.errors import NoEngineError
from peftplan.memory.activations import power
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.norms import layernorm, rms_normed
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

Norm = Callable[[Model, str, Tensor, "int | None"], Tensor]


def called(norm: Norm) -> Norm:
    """A norm as a module that is called, where hooks are around modules."""

    @wraps(norm)
    def call(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
        if model.tape.modules is None:
            return norm(model, name, x, layer)
        own = model.part(name, layer)
        return model.tape.call(name, layer, (own.weight, own.bias), x, lambda x: norm(model, name, x, layer))

    return call


def rms(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`LlamaRMSNorm`."""
    return model.rmsnorm(name, x, layer)


def rms_cast_last(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`Olmo2RMSNorm`: the weight multiplies in fp32."""
    return model.rmsnorm(name, x, layer, cast_last=True)


@called
def rms_plus_one(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`GemmaRMSNorm`: `(1 + weight)`, computed after the normalized x, multiplies in fp32. A kernel in its place writes the
    gradient into a tensor of its own (unsloth, kernels/rms_layernorm.py: `ctx.reuse_grad and not ctx.GEMMA`)."""
    f, kernel = model.tape, model.running.kernels.rms_norm
    f.module = name
    weight = model.part(name, layer).weight
    assert weight is not None
    if kernel is not None:
        from peftplan.memory.fused_layers import rms_norm

        return rms_norm(f, kernel._replace(reuses_gradient=False), x, weight)
    normed = rms_normed(f, f.to(x, "fp32"))
    normed = ops.mul(f, normed, ops.shift(f, f.to(weight, "fp32")))
    narrow: Tensor = f.to(normed, x.dtype)
    return narrow


@called
def rms_by_power(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`Gemma4RMSNorm`: `pow(mean, -0.5)`, which keeps the mean; the weight, where there is one, multiplies in fp32."""
    f, kernel = model.tape, model.running.kernels.rms_norm
    f.module = name
    weight = model.part(name, layer).weight
    if kernel is not None:
        raise NoEngineError("kernels in place of Gemma 4's norms (no formula yet)")
    normed = rms_normed(f, f.to(x, "fp32"), by_power=True)
    if weight is not None:
        normed = ops.mul(f, normed, f.to(weight, "fp32"))
    narrow: Tensor = f.to(normed, x.dtype)
    return narrow


def layer_norm(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`nn.LayerNorm`."""
    return model.layernorm(name, x, layer)


@called
def layer_norm_plus_one(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`NemotronLayerNorm1P`: `weight + 1`, and under autocast all in its dtype, in which the norm then runs."""
    f, part = model.tape, model.part(name, layer)
    f.module = name
    assert part.bias is not None
    weight: Operand = ops.shift(f, part.own_weight)
    bias: Operand = part.bias
    if f.autocast:
        x, weight, bias = f.to(x, f.autocast), f.to(weight, f.autocast), f.to(bias, f.autocast)
    autocast, f.autocast = f.autocast, None
    try:
        return layernorm(f, x, weight, bias)
    finally:  # a recomputation may stop inside
        f.autocast = autocast


@called
def bare_layer_norm(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`OlmoLayerNorm`: in fp32, without parameters."""
    f = model.tape
    f.module = name
    narrow: Tensor = f.to(layernorm(f, f.to(x, "fp32"), None), x.dtype)
    return narrow


@called
def written_layer_norm(model: Model, name: str, x: Tensor, layer: int | None) -> Tensor:
    """`CohereLayerNorm`: the difference to the mean is made twice, once for the variance; the weight multiplies in fp32."""
    f = model.tape
    f.module = name
    dtype, weight = x.dtype, model.part(name, layer).weight
    x = f.to(x, "fp32")
    center = mean(f, x)
    variance = mean(f, power(f, minus(f, x, center)))
    centered = minus(f, x, center)
    rstd = ops.keeps_output(f, ops.shift(f, variance), "rsqrt")
    x = ops.mul(f, centered, rstd)
    del centered, rstd
    assert weight is not None
    x = ops.mul(f, f.to(weight, "fp32"), x)
    narrow: Tensor = f.to(x, dtype)
    return narrow


def mean(f: Tape, x: Tensor) -> Tensor:
    """`x.mean(-1, keepdim=True)`: keeps nothing; its gradient is spread over the row and divided."""
    return f.new((*x.dims[:-1], 1), x.dtype, "mean", f.record(_mean_backward, (x,), x.dims))


def _mean_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "div")


def minus(f: Tape, x: Tensor, row: Tensor) -> Tensor:
    """`x - row`, one number of `row` for each row of x: keeps nothing."""
    return f.new(x.dims, x.dtype, "sub", f.record(_minus_backward, (x, row), row.dims))


def _minus_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Gradients:
    negative = f.new(g.dims, g.dtype, "neg")
    to_row = f.new(saved[0], g.dtype, "sum")
    del negative
    return g, to_row
