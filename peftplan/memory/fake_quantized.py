"""Linear layers that torchao fake-quantizes: int8 activations by token, int4 weights by groups of a row, computed in 16 bits.

Source: torchao, quantization/qat/linear.py (`FakeQuantizedLinear.forward`), qat/fake_quantizer.py (`IntxFakeQuantizer`,
`Int4WeightFakeQuantizer`), quant_primitives.py (`_do_fake_quantize_affine`). Left out: the minimum and maximum of each token,
of groups too where no gradient reaches them, and the steps from them to a scale.
"""

from __future__ import annotations

from peftplan.memory.parts import Part
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Operand, Tensor

Scales = dict[tuple[str, int | None, str], tuple[Tensor, ...]]
"""Module, layer and what is quantized → scale and zero point of its last forward, which the quantizer keeps."""


def linear(f: Tape, part: Part, x: Tensor, scales: Scales, *, group: int, scales_dtype: str | None = "fp32") -> Tensor:
    """`FakeQuantizedLinear.forward`. `scales_dtype`: of a group's scale (`scales_precision`), in which it is rounded; None: it is
    rounded between the ends of the group, which gradients reach."""
    weight = part.own_weight
    rows, columns = weight.dims
    assert isinstance(columns, int)
    by_token = scales[part.name, part.layer, "input"] = _scales(f, (*x.dims[:-1], 1))
    x = _fake_quantized(f, x, by_token)
    if scales_dtype is None:
        return products.linear(f, x, _between_ends(f, weight, group), part.bias)
    by_group = scales[part.name, part.layer, "weight"] = _scales(f, (rows, columns // group), scales_dtype)
    fake = _fake_quantized(f, weight, by_group)
    return products.linear(f, x, fake, part.bias)


def table(f: Tape, part: Part, scales: Scales) -> Tensor:
    """The table of an embedding, rounded row by row in one kernel that torch compiles (`FakeQuantizedEmbedding.forward`)."""
    weight = part.own_weight
    rows, _ = weight.dims
    narrow = f.new((rows,), weight.dtype, "scale")
    fake = f.new(weight.dims, weight.dtype, "fake_quantize", f.record(_rounded_backward, (weight,)))
    scales[part.name, part.layer, "weight"] = narrow, f.new((rows,), "int32", "zero point")
    return fake


GROUP = 128
"""Columns of a group of torchao's `Int4WeightOnlyConfig`, as Unsloth asks for it."""


def frozen(f: Tape, weight: Operand) -> Tensor:
    """A frozen weight of whole groups, rounded in fp32 line by line (`Int4WeightFakeQuantizer._bf16_activations_forward`)."""
    rows, columns = weight.dims
    assert isinstance(columns, int)
    of_groups: Dims = (rows, columns // GROUP, 1)
    with f.no_grad():
        wide = f.new(weight.dims, "fp32", "to")
        largest, smallest = (f.new(of_groups, "fp32", name) for name in ("amax", "amin"))
        scale, zero_point = (f.new(of_groups, "fp32", name) for name in ("scale", "zero point"))
        rounded = wide
        for line in ("sub", "div", "round", "clamp", "sub"):
            rounded = f.new(weight.dims, "fp32", line)
        scaled = f.new(weight.dims, "fp32", "mul")
        rounded = f.new(weight.dims, "fp32", "add")
        del scaled
        fake = f.new(weight.dims, weight.dtype, "to")
    del wide, largest, smallest, scale, zero_point, rounded
    return fake


def _rounded_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "where")


def quantizes(part: Part, *, group: int) -> bool:
    """Whether a layer is replaced: one whose rows are whole groups."""
    columns = part.own_weight.dims[1]
    return isinstance(columns, int) and columns % group == 0


def _scales(f: Tape, dims: Dims, dtype: str = "fp32") -> tuple[Tensor, Tensor]:
    return f.new(dims, dtype, "scale"), f.new(dims, dtype, "zero point")


def _fake_quantized(f: Tape, x: Operand, scales: tuple[Tensor, ...]) -> Tensor:
    """Rounded to few values and back. The values before `clamp` wait for backward; after it they live until this returns."""
    scale = scales[0]
    inverse = f.new(scale.dims, scale.dtype, "reciprocal")
    wide = ops.mul(f, x, inverse)
    del inverse
    rounded = ops.shift(f, wide, "round")
    del wide
    shifted = ops.shift(f, rounded, "add")
    del rounded
    quantized = f.new(x.dims, shifted.dtype, "clamp", f.record(_clamp_backward, (shifted,), shifted))
    del shifted
    narrow = ops.shift(f, quantized, "to") if quantized.dtype == x.dtype else f.to(quantized, x.dtype)
    narrow_zero_point = None if scale.dtype == x.dtype else f.new(scale.dims, x.dtype, "to")
    centred = ops.shift(f, narrow, "sub")
    del narrow, narrow_zero_point
    wide = ops.mul(f, centred, scale)
    del centred
    out = f.to(wide, x.dtype)
    del wide, quantized
    return out


def _clamp_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    (shifted,) = saved
    masks = [f.new(shifted.dims, "bool", op) for op in ("ge", "le")]
    out = f.new(g.dims, g.dtype, "where")
    del masks
    return out


def _between_ends(f: Tape, weight: Operand, group: int) -> Tensor:
    """`Int4WeightFakeQuantizer._bf16_activations_forward`: fp32 values of the weight wait for backward four times."""
    rows, columns = weight.dims
    assert isinstance(columns, int)
    ends: Dims = (rows, columns // group)
    wide = f.to(weight, "fp32")
    greatest, least = (f.new(ends, "fp32", op, f.record(_end_backward, (wide,), wide)) for op in ("amax", "amin"))
    difference = f.new(ends, "fp32", "sub", f.record(_difference_backward, (greatest, least)))
    clamped = f.new(ends, "fp32", "clamp", f.record(_clamp_backward, (difference,), difference))
    scale = ops.scale(f, clamped, "div")
    zero_point = ops.add(f, least, ops.scale(f, scale))
    above = f.new(wide.dims, "fp32", "sub", f.record(_difference_backward, (wide, least), ends))
    quotient = f.new(wide.dims, "fp32", "div", f.record(_quotient_backward, (above, scale), above, ends))
    del above, difference, clamped
    rounded = ops.shift(f, quotient, "round")
    del quotient
    quantized = f.new(wide.dims, "fp32", "clamp", f.record(_clamp_backward, (rounded,), rounded))
    del rounded
    centred = ops.shift(f, quantized, "sub")
    del quantized
    product = ops.mul(f, centred, scale)
    del centred
    out = ops.add(f, product, zero_point)
    del product
    return f.to(out, weight.dtype)


def _end_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    """`scale_grad_by_count`: a share of the gradient for each value that is the end of its group."""
    (wide,) = saved
    mask = f.new(wide.dims, "bool", "eq")
    masked = f.new(wide.dims, "fp32", "mul")
    count = f.new(g.dims, "int64", "sum")
    out = f.new(wide.dims, "fp32", "div")
    del mask, masked, count
    return out


def _difference_backward(f: Tape, node: Node, saved: tuple[Dims] | tuple[()], g: Tensor) -> tuple[Tensor, Tensor]:
    return g, ops.of_broadcast(f.alike(g, g.dtype, "neg"), saved[0] if saved else None)


def _quotient_backward(f: Tape, node: Node, saved: tuple[Tensor, Dims], g: Tensor) -> tuple[Tensor, Tensor]:
    """`div_tensor_other_grad`, whose factors live until its result is there, then `div_tensor_self_backward`."""
    factors = [f.alike(g, "fp32", op) for op in ("div", "div", "neg")]
    of_scale = f.alike(g, "fp32", "mul")
    del factors
    return f.alike(g, "fp32", "div"), ops.of_broadcast(of_scale, saved[1])
