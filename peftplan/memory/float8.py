"""Linear layers that compute in 8 bits with one scale per tensor, as torchao's `Float8Linear` does without torch.compile.

n tokens, i inputs, o outputs. Source: torchao, float8/float8_linear.py (`matmul_with_hp_or_float8_args`), float8_ops.py
(`preprocess_addmm`), float8_training_tensor.py (`_ToFloat8ConstrFunc`). Left out: scales, 512 bytes each.
"""

from __future__ import annotations

from peftplan.memory.parts import Part
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

MULTIPLE = 16
"""A layer with another number of inputs or outputs stays as it is (nemo_automodel, components/quantization/fp8.py)."""


def computes(dims: Dims, *, is_head: bool) -> bool:
    """Whether a layer with a weight of these dims is replaced: each but the head, which the recipe's files leave out."""
    return not is_head and all(isinstance(dim, int) and dim % MULTIPLE == 0 for dim in dims)


def linear(f: Tape, part: Part, x: Tensor) -> Tensor:
    """`Float8Linear.forward`: saves x in 16 bits and the weight, of which FSDP2 has gathered 8 bits."""
    weight = part.own_weight
    node = f.record(_backward, (x, weight))
    narrow = _narrowed(f, x)
    out = f.new((*x.dims[:-1], weight.dims[0]), x.dtype, "_scaled_mm", node)
    del narrow
    if node is not None:
        node.in_python = True
        f.keep(node, x, weight)
    return out if part.bias is None else ops.add(f, out, part.bias)


def _narrowed(f: Tape, x: Operand) -> Tensor:
    """x in 8 bits: its absolute values give the scale; two fp32 copies live at once, and the second until 8 bits are there."""
    absolute = f.new(x.dims, x.dtype, "abs")
    del absolute
    wide = f.new(x.dims, "fp32", "to")
    scaled = f.new(x.dims, "fp32", "mul")
    del wide
    clamped = f.new(x.dims, "fp32", "clamp")
    out = f.new(x.dims, "fp8_e4m3", "to")
    del scaled, clamped
    return out


def _backward(f: Tape, node: Node, saved: tuple[Tensor, Operand], g: Tensor) -> Gradients:
    """Both products want their second factor by columns, and that of the weight both: what lies otherwise is copied. The gradient
    of the result is narrowed once for each product, and all of it lives until both are done."""
    x, weight = saved
    by_rows = _narrowed(f, g)
    columns = f.new(weight.dims, "fp8_e4m3", "contiguous")
    grad_x = f.new(x.dims, x.dtype, "_scaled_mm")
    del columns
    by_columns, inputs = _narrowed(f, g), _narrowed(f, x)
    columns = f.new(g.dims, "fp8_e4m3", "contiguous")
    columns_of_x = f.new(x.dims, "fp8_e4m3", "contiguous")
    grad_weight = f.new(weight.dims, x.dtype, "_scaled_mm")
    del by_rows, by_columns, inputs, columns, columns_of_x
    return grad_x, grad_weight
