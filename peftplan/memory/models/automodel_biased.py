"""Biases of gpt-oss's experts as NeMo Automodel adds them to few rows at once.

Source: nemo_automodel 0.7.0, components/moe/experts.py (`_apply_bias`, `_DeterministicBiasRepeatInterleave`); torch,
native/Repeat.cpp. More rows than `job.automodel.ROWS_AT_ONCE` get theirs in `automodel_moe.biased`.
"""

from __future__ import annotations

from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor


def added_at_once(f: Tape, x: Tensor, bias: Operand, weights: Tensor | None) -> Tensor:
    """`x + repeat_interleave(bias)`, which keeps nothing; or in fp32 with a weight for each row, and back in the dtype of x: that
    keeps the bias of each row, in fp32 where it trains, and the weights."""
    rows = _repeated(f, x, bias.dtype if weights is None or bias.node is None else "fp32")
    if weights is None:
        out = f.new(x.dims, x.dtype, "add", f.record(_added_backward, (x, bias), bias.dims))
        del rows
        return out
    node = f.record(_weighted_backward, (x, bias, weights), rows, weights.detach(), bias.dims, x.dtype)
    product = f.new(x.dims, "fp32", "mul")
    del rows
    total = f.new(x.dims, "fp32", "add")
    out = f.new(x.dims, x.dtype, "to", node)
    del product, total
    return out


def _repeated(f: Tape, x: Tensor, dtype: str) -> Tensor:
    """Which expert a row is of, and its bias."""
    expert = f.new(x.dims[:-1], "int64", "repeat_interleave")
    rows = f.new(x.dims, dtype, "index_select")
    del expert
    return rows


def _added_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Gradients:
    return g, _summed(f, saved[0], g.dtype) if node.edges[1] else None


def _summed(f: Tape, dims: Dims, dtype: str) -> Tensor:
    """`_reduce_bias_grad_triton`: sums of each expert in fp32."""
    wide = f.new(dims, "fp32", "sums")
    return f.to(wide, dtype)


def _weighted_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor, Dims, str], g: Tensor) -> Gradients:
    wide = f.new(g.dims, "fp32", "to")
    to_x = f.new(g.dims, saved[3], "to")
    product = f.new(g.dims, "fp32", "mul") if node.edges[2] else None
    to_rows = f.new(g.dims, "fp32", "mul") if node.edges[1] else None
    to_weights = None if product is None else f.new(saved[1].dims, "fp32", "sum")
    del product, wide
    to_bias = _summed(f, saved[2], "fp32") if to_rows is not None else None
    del to_rows
    return to_x, to_bias, to_weights
