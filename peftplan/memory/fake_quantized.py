"""Linear layers that torchao fake-quantizes: int8 activations by token, int4 weights by groups of a row, computed in 16 bits.

Source: torchao, quantization/qat/linear.py (`FakeQuantizedLinear.forward`), qat/fake_quantizer.py (`IntxFakeQuantizer`),
quant_primitives.py (`_do_fake_quantize_affine`). Left out: the minimum and maximum of each token and group, and the
steps from them to a scale.
"""

from __future__ import annotations

from peftplan.memory.parts import Part
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Operand, Tensor

Scales = dict[tuple[str, int | None, str], tuple[Tensor, ...]]
"""Module, layer and what is quantized → scale and zero point of its last forward, which the quantizer keeps."""


def linear(f: Tape, part: Part, x: Tensor, scales: Scales, *, group: int, scales_dtype: str = "fp32") -> Tensor:
    """`FakeQuantizedLinear.forward`. `scales_dtype`: of a group's scale (`scales_precision`), in which it is rounded."""
    weight = part.own_weight
    rows, columns = weight.dims
    assert isinstance(columns, int)
    by_token = scales[part.name, part.layer, "input"] = _scales(f, (*x.dims[:-1], 1))
    x = _fake_quantized(f, x, by_token)
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
