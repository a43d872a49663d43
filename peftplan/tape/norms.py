"""Norms as allocations: torch's `layer_norm`, and RMSNorm as transformers spells it out. Like `tape.ops`, whose words it uses."""

from __future__ import annotations

from collections.abc import Sequence

from peftplan.tape.ops import mul
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Operand, Tensor


def rmsnorm(f: Tape, x: Tensor, weight: Operand | None, *, cast_last: bool = False) -> Tensor:
    """Llama's RMSNorm: `x32 * rsqrt(mean(x32²) + eps)`, cast back to the dtype of x, times the weight.

    Saves the fp32 copy of x, the result of rsqrt, and the normalized x if the weight trains. `cast_last` (Gemma): multiplies by
    the weight before the cast. Source: transformers, `LlamaRMSNorm.forward`.
    """
    normed = rms_normed(f, f.to(x, "fp32"))
    if cast_last:
        out = normed if weight is None else mul(f, weight, normed)  # `normed` stays alive until this returns
        narrow: Tensor = f.to(out, x.dtype)
        return narrow
    low = f.to(normed, x.dtype)
    out = low if weight is None else mul(f, weight, low)
    del normed
    return out


def rms_normed(f: Tape, x32: Tensor, *, by_power: bool = False) -> Tensor:
    """`x32 * rsqrt(mean(x32²) + eps)` in fp32: saves both factors. `by_power`: `pow(…, -0.5)`, which saves what it reads too."""
    return mul(f, x32, _inverse_rms(f, x32, by_power=by_power))


def _inverse_rms(f: Tape, x32: Tensor, *, by_power: bool) -> Tensor:
    """`rsqrt(x.pow(2).mean(-1) + eps)`, one number per row: saves x and its result, `by_power` the mean and eps instead."""
    row = (*x32.dims[:-1], 1)
    node = f.record(_inverse_rms_backward, (x32,), x32)
    squared = f.new(x32.dims, "fp32", "pow")
    mean = f.new(row, "fp32", "mean")
    del squared
    shifted = f.new(row, "fp32", "add")
    rstd = f.new(row, "fp32", "rsqrt", node)
    f.keep(node, (shifted if by_power else rstd).detach())
    del shifted, mean
    return rstd


def _inverse_rms_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Tensor:
    dims = saved[0].dims
    inner = f.new(g.dims, "fp32", "mul")
    spread = f.new(dims, "fp32", "div")
    del inner
    power = f.new(dims, "fp32", "pow")
    doubled = f.new(dims, "fp32", "mul")
    out = f.new(dims, "fp32", "mul")
    del spread, power, doubled
    return out


def layernorm(f: Tape, x: Operand, weight: Operand | None, bias: Operand | None = None) -> Tensor:
    """`native_layer_norm`: saves its inputs, and the mean and rstd of each row in fp32. Autocast runs it in fp32."""
    if f.autocast:
        x, weight, bias = f.cast_all("fp32", x, weight, bias)
    row = (*x.dims[:-1], 1)
    node = f.record(_layernorm_backward, (x, weight, bias), x, weight, bias)
    out = f.new(x.dims, x.dtype, "layer_norm", node)
    f.keep(node, f.new(row, "fp32", "mean"), f.new(row, "fp32", "rstd"))
    return out


def _layernorm_backward(f: Tape, node: Node, saved: Sequence[Tensor], g: Tensor) -> Gradients:
    grad = f.new(saved[0].dims, g.dtype, "native_layer_norm_backward") if node.edges[0] else None
    width = (saved[0].dims[-1],)
    weight = f.new(width, g.dtype, "sum") if node.edges[1] else None
    bias = f.new(width, g.dtype, "sum") if node.edges[2] else None
    return grad, weight, bias
