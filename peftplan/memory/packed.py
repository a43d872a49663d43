"""Linear layers of gptqmodel on a packed weight, in training (nn_modules/qlinear).

Left out: the fused product of awq, for so few tokens that no job here has them (`FEWEST_DENSE`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.memory.timed import UNPACKED
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Strided, Tensor

if TYPE_CHECKING:
    from peftplan.memory.parts import Part, Running

IN_16_BITS = "fp16"
"""The dtype of the scales, in which a weight is dequantized."""
FEWEST_DENSE = 129
"""Tokens from which awq's product in training dequantizes its weight (gptqmodel, /modules/triton/scheduler.py, `legacy_plan`)."""


def linear_of_gptq(f: Tape, part: Part, x: Tensor, running: Running) -> Tensor:
    """`TorchLinear._forward_eager`, which `TritonV2Linear` runs in training: an ordinary product with the weight dequantized by
    one compiled kernel, so that autograd keeps the dequantized weight, in the dtype of the product, until backward."""
    rows = ops.copied(f, x, "clone") if type(x) is Strided and not x.rows_are_a_view else x  # `reshape` to rows
    weight = f.to(f.new(_dims(part), IN_16_BITS, UNPACKED), x.dtype)
    out = products.linear(f, rows, weight, transposed=True)
    del weight
    return _with_bias(f, part, out, in_place=True)


def linear_of_awq(f: Tape, part: Part, x: Tensor, running: Running) -> Tensor:
    """`AwqGEMMTritonLinear`, and its `AwqGemmTritonFn`: the input in fp16; both passes dequantize the weight, and keep none.

    Autocast casts what the product within takes. `AwqGEMMLinear`, which is taken where a compiler of CUDA is, allocates the same
    above 1,024 tokens.
    """
    dtype = x.dtype
    x = f.to(x, IN_16_BITS)
    x = ops.copied(f, x, "clone", viewed=False) if type(x) is Strided else x
    node = f.record(_linear_of_awq_backward, (x,), part, x.dims)
    if node is not None:
        node.in_python = True
    weight = f.new(_dims(part), IN_16_BITS, "dequantized")
    computed = f.autocast or IN_16_BITS
    casts = [f.new(t.dims, computed, "to") for t in (weight, x) if computed != IN_16_BITS]
    out = f.new((*x.dims[:-1], part.own_weight.dims[0]), computed, "mm", node)
    del casts, weight
    with f.no_grad():
        out = _with_bias(f, part, out, in_place=False)
    out.node = node
    return out if dtype == IN_16_BITS else f.to(out, dtype)


def _linear_of_awq_backward(f: Tape, node: Node, saved: tuple[Part, Dims], g: Tensor) -> Tensor:
    part, x_dims = saved
    weight = f.to(f.new(_dims(part), IN_16_BITS, "dequantized"), g.dtype)
    grad = f.view_of(f.new(x_dims, g.dtype, "mm"))
    del weight
    return grad if g.dtype == IN_16_BITS else f.new(x_dims, IN_16_BITS, "to")  # what the engine makes of it, `validate_outputs`


def _dims(part: Part) -> Dims:
    """Inputs and outputs."""
    n_out, n_in = part.own_weight.dims
    return n_in, n_out


def _with_bias(f: Tape, part: Part, out: Tensor, *, in_place: bool) -> Tensor:
    if part.bias is None:
        return out
    return ops.add_(f, out, f.to(part.bias, out.dtype)) if in_place else ops.add(f, out, part.bias)
