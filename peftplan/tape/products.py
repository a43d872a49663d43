"""Matrix products as allocations: `linear` with a weight, `matmul` of two activations. Like `tape.ops`, whose words it uses."""

from __future__ import annotations

from typing import TypeAlias

from peftplan.tape.ops import add, copied
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Broadcast, Dims, Gradients, Node, Operand, Strided, Tensor

Product: TypeAlias = tuple[Operand | None, Operand | None, Dims, Dims, Dims | None]
"""What a product with a weight saves: x, the weight, the dims of x, the dims of the weight, the dims of the bias."""


def linear(f: Tape, x: Tensor, weight: Operand, bias: Operand | None = None, *, transposed: bool = False) -> Tensor:
    """`linear` (mm, addmm): saves x if the weight trains, and the weight if x requires a gradient. Autocast casts its inputs.

    x is (…, in), the result (…, out). The weight is (out, in), or (in, out) if `transposed` (Conv1D, `x @ W`).

    A strided x never goes to addmm. It is copied if the weight trains, unless its rows are a view; otherwise bmm reads it as it
    is. Source: torch, aten/src/ATen/native/Linear.cpp (`linear`), LinearAlgebra.cpp (`should_fold`).
    """
    if f.autocast:
        x, weight, bias = f.cast_all(f.autocast, x, weight, bias)
    if f.linear_in_python and not transposed:
        return _linear_in_python(f, x, weight, bias)
    op = "linear" if bias is None or type(x) is Strided else "addmm"
    if type(x) is Strided and weight.node is not None and not x.rows_are_a_view:
        x = copied(f, x, "clone")
    saved = (x if weight.node else None, weight if x.node else None, x.dims, weight.dims, None if bias is None else bias.dims)
    backward = _addmm_backward if op == "addmm" else _linear_backward
    node = f.record(backward, (x, weight, bias), *saved)
    if node is not None:
        node.folds = True
    return f.new((*x.dims[:-1], weight.dims[1 if transposed else 0]), x.dtype, op, node)


def _linear_in_python(f: Tape, x: Tensor, weight: Operand, bias: Operand | None) -> Tensor:
    """DeepSpeed's `LinearFunctionForZeroStage3`: saves x, whatever trains, and the weight, once the result is there
    (runtime/zero/linear.py)."""
    node = f.record(_linear_in_python_backward, (x, weight, bias))
    out = f.new((*x.dims[:-1], weight.dims[0]), x.dtype, "linear", node)
    if node is not None:
        node.in_python = True
        f.keep(node, x, weight, x.dims, weight.dims, None if bias is None else bias.dims)
    return out


def _linear_in_python_backward(f: Tape, node: Node, saved: Product, g: Tensor) -> Gradients:
    _, _, x_dims, w_dims, bias_dims = saved
    to_x, to_weight, to_bias = node.edges
    grad_x = f.new(x_dims, g.dtype, "mm") if to_x else None
    grad_weight = f.new(w_dims, g.dtype, "mm") if to_weight else None
    grad_bias = f.column_sum(g.dims, bias_dims, g.dtype) if to_bias and bias_dims is not None else None
    return grad_x, grad_weight, grad_bias


def _linear_backward(f: Tape, node: Node, saved: Product, g: Tensor) -> Gradients:
    _, _, x_dims, w_dims, bias_dims = saved
    to_x, to_weight, to_bias = node.edges
    grad_weight = f.view_of(f.new(w_dims, g.dtype, "mm")) if to_weight else None  # a view: the gradient of the transposed weight
    grad_x = f.new(x_dims, g.dtype, "mm") if to_x else None
    if grad_x is not None and len(x_dims) > 2:
        f.view_of(grad_x)  # mm returns two dims; `reshape` restores those of x
    grad_bias = f.column_sum(g.dims, bias_dims, g.dtype) if to_bias and bias_dims is not None else None
    return grad_x, grad_weight, grad_bias


def _addmm_backward(f: Tape, node: Node, saved: Product, g: Tensor) -> Gradients:
    """`mat1` before `mat2`. The autograd engine sums the gradient of the bias."""
    _, _, x_dims, w_dims, bias_dims = saved
    to_x, to_weight, to_bias = node.edges
    grad_x = f.new(x_dims, g.dtype, "mm") if to_x else None
    if grad_x is not None and len(x_dims) > 2:
        f.view_of(grad_x)
    grad_weight = f.view_of(f.new(w_dims, g.dtype, "mm")) if to_weight else None
    return grad_x, grad_weight, Broadcast(g, bias_dims) if to_bias and bias_dims is not None else None


def falcon_linear(f: Tape, x: Tensor, weight: Operand, bias: Operand | None = None) -> Tensor:
    """`FalconLinear`: `x @ weight.T`, and a separate `add` of the bias.

    Autocast does not cache the cast of a transposed weight, so each call casts it again. It does not cast the bias: the sum with
    an fp32 bias is fp32. The transposed weight is a view, which keeps what ranks have gathered. Source: transformers,
    modeling_falcon.py.
    """
    if f.autocast:
        weight = f.to(weight, f.autocast)
        x = f.cast(x, f.autocast)
    saved = (x if weight.node else None, f.gathered(weight) if x.node else None, x.dims, weight.dims, None)
    node = f.record(_linear_backward, (x, weight, None), *saved)
    out = f.new((*x.dims[:-1], weight.dims[0]), x.dtype, "mm", node)
    return out if bias is None else add(f, out, bias)


def matmul(f: Tape, a: Tensor, b: Tensor, dims: Dims, *, transposed: bool = False) -> Tensor:
    """`matmul` of two activations (bmm), with a result of `dims`: saves each factor whose partner requires a gradient.

    Autocast casts both factors. `transposed` (`a @ b.mT`): the gradient of b is a view of one whose last two dims are swapped.
    """
    if f.autocast:
        a, b = f.cast_all(f.autocast, a, b)
    node = f.record(_matmul_backward, (a, b), a if b.node else None, b if a.node else None, a.dims, b.dims, transposed)
    return f.new(dims, a.dtype, "bmm", node)


def _matmul_backward(f: Tape, node: Node, saved: tuple[Tensor | None, Tensor | None, Dims, Dims, bool], g: Tensor) -> Gradients:
    grad_b = f.view_of(f.new(saved[3], g.dtype, "bmm")) if node.edges[1] else None
    if saved[4] and grad_b is not None and grad_b.storage is not None:
        f.permuted.add(grad_b.storage.number)
    grad_a = f.view_of(f.new(saved[2], g.dtype, "bmm")) if node.edges[0] else None
    return grad_a, grad_b
