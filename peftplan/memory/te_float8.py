"""Linear layers of Transformer Engine, and those of experts, that compute in 8 bits.

n tokens, i inputs, o outputs. A tensor in 8 bits lies by rows, for the product of the forward and that of the input's gradient,
and by columns, for that of the weight's gradient. Source: transformer-engine 2.20.2, pytorch/module/linear.py
(`_linear_forward_impl`, `_linear_backward_impl`, of layers that FSDP2 divides), grouped_linear.py (`_GroupedLinear`),
csrc/quantizer.cpp (`create_tensor`), csrc/extensions/cast.cpp (`split_quantize`). Left out: one scale of a tensor, and those of
blocks of a weight.
"""

from typing import NamedTuple

from peftplan.job.kernel_facts import Narrow
from peftplan.ledger import Dim
from peftplan.memory.fused_attention import number
from peftplan.memory.parts import Part
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

DTYPE = "fp8_e4m3"


class Sides(NamedTuple):
    """A tensor in 8 bits, with its scales: by rows and by columns."""

    rows: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]


def narrowed(f: Tape, x: Operand, narrow: Narrow, *, is_weight: bool = False, columns: bool = True) -> Sides:
    """Both sides of x, or its rows alone."""
    rows, of_columns = (_side(f, x, narrow, is_weight=is_weight) if wanted else () for wanted in (True, columns))
    return Sides(rows, of_columns)


def _side(f: Tape, x: Operand, narrow: Narrow, *, is_weight: bool) -> tuple[Tensor, ...]:
    data = f.new(x.dims, DTYPE, "quantize")
    scales = narrow.of_weights if is_weight else narrow.scales
    if scales is None:
        return (data,)
    return data, f.new((*x.dims[:-1], -(-number(x.dims[-1]) // scales.numbers)), scales.dtype, "scales")


def linear(f: Tape, part: Part, x: Tensor, narrow: Narrow) -> Tensor:
    """`_Linear.forward`: keeps x by columns, and the weight that ranks gathered, of which backward makes 8 bits again."""
    weight = part.own_weight
    node = f.record(_backward, (x, weight, part.bias), narrow, x.dims, None if part.bias is None else part.bias.dims, weight)
    sides, of_weight = narrowed(f, x, narrow), narrowed(f, weight, narrow, is_weight=True, columns=False)
    out = f.new((*x.dims[:-1], weight.dims[0]), x.dtype, "linear", node)
    del of_weight
    if node is not None:
        f.keep(node, *sides.columns)
    return out


def _backward(f: Tape, node: Node, saved: tuple[Narrow, Dims, Dims | None, Operand], g: Tensor) -> Gradients:
    """`saved`: and the input by columns."""
    narrow, dims, bias_dims, weight = saved[:4]
    of_bias = f.new(bias_dims, g.dtype, "bgrad") if node.edges[2] and bias_dims is not None else None
    of_g = narrowed(f, g, narrow)
    of_weight = narrowed(f, weight, narrow, is_weight=True)
    to_x = f.new(dims, g.dtype, "dgrad")
    of_weight = of_weight._replace(columns=())
    to_weight = f.new(weight.dims, g.dtype, "wgrad")
    del of_g, of_weight
    return to_x, to_weight, of_bias


def grouped(f: Tape, x: Tensor, weight: Operand, width: Dim, *, narrow: Narrow | None, offsets: Tensor) -> Tensor:
    """`_GroupedLinear.forward`: keeps the rows of all experts once it returns, in 8 bits by columns; its weights in 8 bits last
    (`memory.lasting`). `narrow`: None in 16 bits."""
    node = f.record(_grouped_backward, (x, weight), narrow, x.dims, weight.dims)
    sides = None if narrow is None else narrowed(f, x, narrow)
    out = f.new((*x.dims[:-1], width), x.dtype, "grouped linear", node)
    if node is not None:
        f.keep(node, *((x.detach(), offsets) if sides is None else sides.columns))
    return out


def _grouped_backward(f: Tape, node: Node, saved: tuple[Narrow | None, Dims, Dims], g: Tensor) -> Gradients:
    of_g = None if saved[0] is None else narrowed(f, g, saved[0])
    to_x, to_weight = f.new(saved[1], g.dtype, "dgrad"), f.new(saved[2], g.dtype, "wgrad")
    del of_g
    return to_x, to_weight


def padded(f: Tape, x: Tensor) -> Tensor:
    """`_Fp8Padding`, `_Fp8Unpadding`: the rows of each expert in as many as a product in 8 bits takes, and back, keeping
    nothing. Left out: at most 31 rows for each expert."""
    return f.new(x.dims, x.dtype, "padding", f.record(_padded_backward, (x,), x.dims))


def _padded_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "padding")
