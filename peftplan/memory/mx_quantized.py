"""Linear layers that torchao fake-quantizes in MXFP4: inputs and weights in 4 bits, 32 numbers of a row with one scale.

Letters of a record: e elements, h pairs of them, g groups of 32. `4e` allocates numbers of 4 bytes, as many as the letter says;
`-3` ends the third allocation. Forward keeps codes and scales of both operands, from which it and backward make them anew; a bias
gets no gradient. Source: torchao, prototype/qat/mx.py (`_MXQuantizedForwardFakeQuantizedBackward`),
prototype/mx_formats/mx_tensor.py (`to_mx`, `_addmm_mx_dispatch`, `to_dtype`) and kernels.py, whose operations were recorded in
the order in which they allocate. Left out: single numbers.
"""

from __future__ import annotations

from peftplan.ledger import Dim
from peftplan.memory.parts import Part
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

GROUP = 32
QUANTIZED = (
    "2e 2g -1 4e 4g -2 4g 1g 4g 4g -7 4g -8 4g -9 1g -10 1g -6 -11 1g 4g 4g -14 4g -15 4g -13 -16 4e 4e -18 -5 -17 4e 4e 1e "
    "1e 1e 1e -23 -24 1e 1e -26 4e 1e -28 4e 4e -30 4e 1e -32 1e -21 1e -34 1e -35 4e 1e -37 1e -38 1e -36 -20 -22 -25 -27 "
    "-29 -33 -31 -39 -19 1h 1h -41 -40 -3 -4"
)
SCALES, CODES = "12", "42"
RESTORED = (
    "1h 1h 1e -1 -2 1e 1e 1e 1e 1e 1e -8 1e -7 -9 1e 1e 1e -12 4e 4e -14 -13 1e 4e -16 4e 4e 4e 4e -20 4e -19 -4 -5 -6 -10 "
    "-11 -15 -17 -18 -21 2e 2g 2g -24 4g 4g 1g 4g -28 -27 -25 -26 2g -29 2e -23 -3 -22 -30"
)
RESULT = "31"
DTYPE_OF = {"1": "uint8", "2": "bf16", "4": "fp32"}


def linear(f: Tape, part: Part, x: Tensor) -> Tensor:
    """`MXFakeQuantizedLinear.forward`."""
    weight = part.own_weight
    node = f.record(_linear_backward, (x, weight))
    operands = (x, weight)
    kept = [tensor for operand in operands for tensor in _quantized(f, operand)]
    restored = [_restored(f, operand.dims) for operand in operands]
    out = f.new((*x.dims[:-1], weight.dims[0]), x.dtype, "mm", node)
    del restored
    f.keep(node, *kept, x.dims, weight.dims)
    return out


def _linear_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor, Tensor, Tensor, Dims, Dims], g: Tensor) -> Gradients:
    *_, x_dims, weight_dims = saved
    restored = [_restored(f, dims) for dims in (x_dims, weight_dims)]
    to_x = f.new(x_dims, g.dtype, "mm")
    to_weight = f.new(weight_dims, g.dtype, "mm")
    del restored
    return to_x, to_weight


def _quantized(f: Tape, x: Operand) -> tuple[Tensor, Tensor]:
    """`to_mx`: codes and scales."""
    tensors = _run(f, QUANTIZED, x.dims)
    return tensors[CODES], tensors[SCALES]


def _restored(f: Tape, dims: Dims) -> Tensor:
    """`MXTensor.dequantize`."""
    return _run(f, RESTORED, dims)[RESULT]


def _run(f: Tape, events: str, dims: Dims) -> dict[str, Tensor]:
    """What a record leaves of a tensor of these dims."""
    *rows, columns = dims
    assert isinstance(columns, int)
    sizes: dict[str, tuple[Dim, ...]] = {"e": dims, "h": (*rows, columns // 2), "g": (*rows, columns // GROUP)}
    tensors: dict[str, Tensor] = {}
    number = 0
    for event in events.split():
        if event.startswith("-"):
            del tensors[event[1:]]
            continue
        number += 1
        tensors[str(number)] = f.new(sizes[event[1:]], DTYPE_OF[event[0]], "of MXFP4")
    return tensors
