"""torch's operations as allocations: the result of each, what it saves for backward, and what its backward allocates.

Each function names its formula in torch's tools/autograd/derivatives.yaml and saves the tensors that this formula saves. Backward
functions allocate gradients in the order of that file's entries: by argument name, so `mat2` and `other` come before `self`.

`f` is the tape, `g` the gradient of the result. A docstring that says "saves" means: until this node's backward has run.
"""

from __future__ import annotations

from typing import TypeAlias

from peftplan.tape.sorted_indices import BUFFERS, sorted_dim
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Broadcast, Dims, Gradients, Node, Operand, Tensor


def promoted(a: str, b: str) -> str:
    """The result dtype of a binary operation on two floating dtypes (torch's type promotion)."""
    return a if a == b else "fp32"


def _broadcast(a: Tensor, b: Operand) -> Dims | None:
    """The dims of b if b is broadcast to those of a, the dims of the result; else None."""
    return None if a.dims == b.dims else b.dims


def of_broadcast(grad: Tensor, like: Dims | None) -> Tensor:
    """The gradient of an input of dims `like`. If the input was broadcast, the autograd engine sums it (`reduce_grad`)."""
    return grad if like is None or grad.dims == like else Broadcast(grad, like)


def embedding(f: Tape, weight: Operand, rows: Dims, ids: Tensor | None = None) -> Tensor:
    """`embedding`: saves the indices. Pass `ids` only if the batch does not hold them. Its gradient covers the whole table."""
    node = f.record(_embedding_backward, (weight,), weight.dims, rows, ids)
    return f.new((*rows, weight.dims[1]), weight.dtype, "embedding", node)


def _embedding_backward(f: Tape, node: Node, saved: tuple[Dims, Dims, Tensor | None], g: Tensor) -> Tensor:
    return table_gradient(f, saved[0], saved[1], g.dtype)


def table_gradient(f: Tape, table: Dims, indices: Dims, dtype: str) -> Tensor:
    """The gradient of an embedding's table (`embedding_dense_backward`); many indices are sorted first (`sorted_indices`)."""
    grad = f.new(table, dtype, "embedding_dense_backward")
    rows, width = table
    assert isinstance(rows, int)
    buffers = [f.new((sorted_dim(indices, rows, what),), "int64", f"sorted {what}") for what in BUFFERS]
    buffers.append(f.new((sorted_dim(indices, rows, "parts"), width), "fp32", "sums of equal indices"))
    del buffers
    return grad


def add(f: Tape, a: Tensor, b: Operand) -> Tensor:
    """`a + b`: saves nothing. b may be broadcast."""
    return f.new(a.dims, promoted(a.dtype, b.dtype), "add", f.record(_add_backward, (a, b), _broadcast(a, b)))


def add_(f: Tape, a: Tensor, b: Operand) -> Tensor:
    """`a += b`: writes into a's storage and saves nothing."""
    return Tensor(a.storage, a.dims, a.dtype, f.record(_add_backward, (a, b), _broadcast(a, b)))


def _add_backward(f: Tape, node: Node, saved: tuple[Dims | None], g: Tensor) -> Gradients:
    return g, of_broadcast(g, saved[0]) if node.edges[1] else None


Factors: TypeAlias = tuple[Operand | None, Operand | None, tuple[Dims, Dims] | None]
"""What `mul` saves: each factor or None, and the dims of both if they differ."""


def mul(f: Tape, a: Operand, b: Operand) -> Tensor:
    """`a * b`: saves each factor whose partner requires a gradient. Either may be broadcast; the result has the longer dims."""
    likes = None if a.dims == b.dims else (a.dims, b.dims)
    node = f.record(_mul_backward, (a, b), a if b.node else None, b if a.node else None, likes)
    return f.new(max(a.dims, b.dims, key=len), promoted(a.dtype, b.dtype), "mul", node)


def _mul_backward(f: Tape, node: Node, saved: Factors, g: Tensor) -> Gradients:
    likes = saved[2]
    dims = g.dims if likes is None else max(likes, key=len)  # those of the result, which g may be a view of
    grad_b = f.alike(g.view(dims), g.dtype, "mul") if node.edges[1] else None
    grad_a = f.alike(g.view(dims), g.dtype, "mul") if node.edges[0] else None
    if likes is None:
        return grad_a, grad_b
    pairs = zip((grad_a, grad_b), likes, strict=True)
    return [None if grad is None else of_broadcast(grad, like) for grad, like in pairs]


def scale(f: Tape, x: Operand, op: str = "mul") -> Tensor:
    """`neg`, or `mul` or `div` by a number: saves nothing. Its backward allocates the gradient of x."""
    return f.new(x.dims, x.dtype, op, f.record(_scale_backward, (x,)))


def scale_(f: Tape, x: Tensor) -> Tensor:
    """`x *= buffer`, a buffer of one number: writes into x's storage and saves the buffer, so that a checkpoint runs to here."""
    return Tensor(x.storage, x.dims, x.dtype, f.record(_scale_backward, (x,), Tensor(None, (1,), x.dtype)))


def _scale_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.alike(g, g.dtype, "mul")


def divide(f: Tape, x: Operand, by: Tensor, *, trained: bool = False) -> Tensor:
    """`x / by`: saves `by`, and x where `by`, a number, is trained."""
    node = f.record(_divided_backward, (x,), by, x) if trained else f.record(_scale_backward, (x,), by)
    return f.new(x.dims, promoted(x.dtype, by.dtype), "div", node)


def _divided_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Tensor:
    """`-g * ((x / by) / by)`, which is summed once the gradient of x is made (torch, `div_tensor_other_backward`). Temporaries of
    an expression live until its end."""
    negated, once, twice = (f.new(g.dims, g.dtype, op) for op in ("neg", "div", "div"))
    of_by = f.new(g.dims, g.dtype, "mul")
    del negated, once, twice
    result = f.new(g.dims, g.dtype, "div")
    del of_by
    return result


def shift(f: Tape, x: Operand, op: str = "add") -> Tensor:
    """`x + number`, or `round`: saves nothing. The gradient of x is that of the result; nothing is allocated."""
    return f.new(x.dims, x.dtype, op, f.record(_shift_backward, (x,)))


def _shift_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return g


def keeps_input(f: Tape, x: Operand, op: str) -> Tensor:
    """An activation that saves its input, such as `silu` and `gelu`."""
    return f.new(x.dims, x.dtype, op, f.record(_same_backward, (x,), x))


def keeps_output(f: Tape, x: Operand, op: str, *, passing: bool = False) -> Tensor:
    """An operation that saves its result: `relu`, `tanh`, `sigmoid`, `exp`.

    `passing`: its backward also allocates a temporary of the same size.
    """
    node = f.record(_passing_backward if passing else _same_backward, (x,))
    out = f.new(x.dims, x.dtype, op, node)
    f.keep(node, out.detach())
    return out


def _same_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "backward")


def _passing_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    out = f.new(g.dims, g.dtype, "backward")
    temporary = f.new(g.dims, g.dtype, "grad * output")
    del temporary
    return out


def softmax(f: Tape, x: Tensor, dtype: str) -> Tensor:
    """`softmax(x, dim=-1, dtype=…)`: saves its result.

    The CUDA kernel reads fp16 and writes fp32 directly. A bf16 input is cast to `dtype` first, which allocates a copy. Backward
    allocates the temporary `grad * output`. Source: torch, SoftMax.cu (`softmax_backward_cuda_out`).
    """
    if x.dtype == "fp16" and dtype == "fp32":
        node = f.record(_half_softmax_backward, (x,))
        out = f.new(x.dims, dtype, "softmax", node)
        f.keep(node, out.detach())
        return out
    return keeps_output(f, f.to(x, dtype), "softmax", passing=True)


def _half_softmax_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    out = f.new(g.dims, "fp16", "backward")
    temporary = f.new(g.dims, g.dtype, "grad * output")
    del temporary
    return out


def heads(f: Tape, x: Tensor, dims: Dims, *, clones: bool = False, at_once: bool = True) -> Tensor:
    """`view(…).transpose(1, 2)`: shares the storage of x.

    `clones`: the gradient arrives with the heads' strides, so that the reshape in backward copies it, unless there is one head or
    the gradient has its last two dims swapped (`matmul`), which makes the numbers of all heads follow each other.
    `at_once`: the view is made directly after x.
    """
    if not clones or dims[1] == 1:
        return x.view(dims)
    node = f.record(_heads_backward, (x,), x.dims)
    if node is not None and type(x.node) is Node and at_once:
        node.sequence = x.node.sequence[0], node.sequence[0]
    return Tensor(x.storage, dims, x.dtype, node)


def _heads_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return g.view(saved[0]) if f.is_permuted(g) else f.new(saved[0], g.dtype, "clone")


def copied(f: Tape, x: Tensor, op: str, dims: Dims | None = None, *, viewed: bool = True) -> Tensor:
    """A copy of x, by `cat` with an empty tensor or `reshape` of a transposed one. The gradient of x is a view of the copy's.

    `viewed=False` (`contiguous`): the gradient of x is the copy's gradient itself.
    """
    return f.new(dims or x.dims, x.dtype, op, f.record(_view_backward if viewed else _shift_backward, (x,)))


def reshaped(f: Tape, x: Tensor, dims: Dims | None = None) -> Tensor:
    """A view with a node of its own, of these dims: shares the storage of x, and its gradient is a view too."""
    return Tensor(x.storage, dims or x.dims, x.dtype, f.record(_view_backward, (x,)))


def _view_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.view_of(g)


def cached(f: Tape, x: Tensor) -> Tensor:
    """`cat` of an empty KV cache and x: a copy of x."""
    return copied(f, x, "cat")


def dropout(f: Tape, x: Tensor, p: float) -> Tensor:
    """`native_dropout`: saves a boolean mask, once both results are there. At p = 0 it returns x and saves nothing."""
    if not p:
        return x
    node = f.record(_scale_backward, (x,))
    mask = f.new(x.dims, "bool", "dropout mask")  # allocated even if no node saves it
    out = f.new(x.dims, x.dtype, "dropout", node)
    f.keep(node, mask)
    return out


KEEPS_OUTPUT = ("relu", "tanh", "sigmoid")
"""Activations whose derivative is computed from their result, which they save in place of their input."""


def activation(f: Tape, x: Tensor, name: str) -> Tensor:
    """An entry of transformers' `ACT2FN` that runs as one torch kernel."""
    return keeps_output(f, x, name) if name in KEEPS_OUTPUT else keeps_input(f, x, name)


def selected(f: Tape, x: Tensor, dims: Dims) -> Tensor:
    """`x[:, 0]`: shares the storage of x. The gradient of x is allocated whole (`select_backward`)."""
    return Tensor(x.storage, dims, x.dtype, f.record(_selected_backward, (x,), x.dims))


def _selected_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "select_backward")


def expanded(f: Tape, x: Operand, dims: Dims) -> Tensor:
    """`expand`: shares the storage of x. Backward sums the gradient over the expanded dims into a new tensor."""
    return Tensor(x.storage, dims, x.dtype, f.record(_expanded_backward, (x,), x.dims))


def _expanded_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "sum")


def gathered(f: Tape, x: Tensor, dims: Dims) -> Tensor:
    """`x[mask]`: copies the rows that the mask selects. The gradient of x is allocated whole (`index_put`)."""
    return f.new(dims, x.dtype, "index", f.record(_selected_backward, (x,), x.dims))


def summed(f: Tape, x: Tensor, dims: Dims = (), dtype: str | None = None) -> Tensor:
    """`sum`, of all elements unless the result has dims: saves nothing. The gradient of x is expanded, a view."""
    return f.new(dims, dtype or x.dtype, "sum", f.record(_summed_backward, (x,), x.dims))


def _summed_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return Tensor(g.storage, saved[0], g.dtype)
