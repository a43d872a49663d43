"""A mixture of experts: tokens sorted by expert, two grouped products, and what each token's experts add.

Letters: n tokens (b·s), k experts a token, e experts, h hidden size, i width of an expert. Rows sorted by expert have dims
(b, s, k, …) here, whatever their order. Sources: transformers, integrations/moe.py (`grouped_mm_experts_forward`,
`_grouped_mm`, `_default_apply_gate`); torch, native/GroupedMMUtils.h and derivatives.yaml (`_grouped_mm`, `index`, `topk`).
Left out, as in the trace engine: the sort inside the backward of `index`, and the kernel's few KiB of offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from peftplan.dtypes import ITEMSIZE
from peftplan.errors import RefusedError
from peftplan.ledger import Dim
from peftplan.memory.methods.param_wrapper import Stacked
from peftplan.tape import ops
from peftplan.tape.shaping import split
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor
from peftplan.versions import named

ALIGNMENT_BYTES = 16
"""Rows of a grouped product's operands must be multiples of it."""

Gate = Callable[[Tape, Tensor], Tensor]
"""Gate and up as one tensor → what the second product takes."""


def top_k(f: Tape, x: Tensor, k: Dim) -> tuple[Tensor, Tensor]:
    """`topk`: values and indices, which it keeps; its gradient is as large as x."""
    dims = (*x.dims[:-1], k)
    node = f.record(_taken_backward, (x,), x.dims)
    values = f.new(dims, x.dtype, "topk", node)
    indices = f.new(dims, "int64", "topk indices")
    f.keep(node, indices)
    return values, indices


def _taken_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "new_zeros")


def taken(f: Tape, x: Operand, indices: Tensor, dims: tuple[Dim, ...], op: str = "index") -> Tensor:
    """`x[indices]`, `gather`: keeps the indices; its gradient is as large as x."""
    return f.new(dims, x.dtype, op, f.record(_taken_backward, (x,), x.dims, indices))


def divided_in_place(f: Tape, x: Tensor, by: Tensor) -> Tensor:
    """`x /= y`, one y for each row of x: keeps a copy of what x was, and y."""
    before = f.new(x.dims, x.dtype, "clone") if f.grad_enabled and x.node is not None else None
    node = f.record(_divided_backward, (x, by), before, by)
    return Tensor(x.storage, x.dims, x.dtype, node)


def _divided_backward(f: Tape, node: Node, saved: tuple[Tensor | None, Tensor], g: Tensor) -> Gradients:
    quotient = f.new(g.dims, g.dtype, "div")
    again = f.new(g.dims, g.dtype, "div")
    negative = f.new(g.dims, g.dtype, "neg")
    by_row = f.new(g.dims, g.dtype, "mul")
    del negative, again, quotient
    to_x = f.new(g.dims, g.dtype, "div")
    to_y = f.new(saved[1].dims, g.dtype, "sum")
    del by_row
    return to_x, to_y


def row_sum(f: Tape, x: Tensor) -> Tensor:
    """`x.sum(-1, keepdim=True)`: its gradient is a view. Autocast asks for an fp32 result."""
    return ops.summed(f, x, (*x.dims[:-1], 1), "fp32" if f.autocast else x.dtype)


def to_local(f: Tape, weight: Operand) -> Operand:
    """`DTensor.to_local` of what ranks divide: a node of its own. Where it comes before both products of experts, the gradient of
    the second waits for that of the first."""
    node = f.record(_to_local_backward, (weight,))
    return weight if node is None else Tensor(None, weight.dims, weight.dtype, node)


def _to_local_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return g


Grouped: TypeAlias = tuple[Operand | None, Operand | None, Tensor, Dims, Dims, bool]
"""What a grouped product saves: x, the weight, the offsets, the dims of x and of the weight, and whether the kernel ran."""


def grouped(
    f: Tape,
    x: Tensor,
    weight: Operand,
    width: Dim,
    *,
    kernel: bool,
    bias: Tensor | None,
    offsets: Tensor,
    transposed: bool = True,
) -> Tensor:
    """`_grouped_linear`: one product over all experts, x in the weight's dtype, which autocast does not change.

    Keeps the offsets, x if the weight trains, and the weight if x has a gradient. Without the kernel (before compute capability
    8.0) transformers' own loop keeps both and makes both gradients.
    A weight that is not `transposed` is read through a view, which keeps what ranks have gathered.
    """
    _check_rows(x, weight)
    x = f.to(x, weight.dtype)
    read = weight if transposed else f.gathered(weight)
    saved = (x, read) if not kernel else (x if weight.node else None, read if x.node else None)
    node = f.record(_grouped_backward, (x, weight), *saved, offsets, x.dims, weight.dims, kernel)
    out = f.new((*x.dims[:-1], width), x.dtype, "grouped_mm", node)
    if bias is None:
        return out
    return Tensor(out.storage, out.dims, out.dtype, f.record(_added_backward, (out, bias)))


def _grouped_backward(f: Tape, node: Node, saved: Grouped, g: Tensor) -> Gradients:
    *_, x_dims, w_dims, kernel = saved
    if not kernel:
        to_x = f.new(x_dims, g.dtype, "zeros_like")
        return to_x, f.new(w_dims, g.dtype, "zeros_like")
    to_weight = f.new(w_dims, g.dtype, "grouped_mm") if node.edges[1] else None
    return f.new(x_dims, g.dtype, "grouped_mm") if node.edges[0] else None, to_weight


def _added_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Gradients:
    return g, g


def _check_rows(x: Tensor, weight: Operand) -> None:
    """Raise RefusedError where the kernel refuses the operands."""
    for operand in (x, weight):
        row = operand.dims[-1]
        assert isinstance(row, int)
        if row * ITEMSIZE[weight.dtype] % ALIGNMENT_BYTES:
            raise RefusedError(
                f"{named('torch')} refuses it: rows of {row} {weight.dtype} numbers in grouped expert products "
                f"are not a multiple of {ALIGNMENT_BYTES} bytes"
            )


def weighted(f: Tape, x: Tensor, weights: Tensor) -> Tensor:
    """`x * weights`, one weight for each row of x.

    The engine casts the gradient of x before it sums the other, and what a checkpointed layer saved is gone by then.
    """
    node = f.record(_weighted_backward, (x, weights), x if weights.node else None, weights if x.node else None, x.dtype)
    return f.new(x.dims, ops.promoted(x.dtype, weights.dtype), "mul", node)


def _weighted_backward(f: Tape, node: Node, saved: Sequence[object], g: Tensor) -> Gradients:
    to_weights = f.new(g.dims, g.dtype, "mul") if node.edges[1] else None
    to_x = f.new(g.dims, g.dtype, "mul") if node.edges[0] else None
    dtype = saved[2]
    assert isinstance(dtype, str)
    if isinstance(saved, list):  # of a checkpointed layer
        saved.clear()
    if to_x is not None:
        to_x = f.to(to_x, dtype)
    return to_x, None if to_weights is None else f.new((*g.dims[:-1], 1), g.dtype, "sum")


def summed(f: Tape, x: Tensor) -> Tensor:
    """`x.view(n, k, h).sum(dim=1)`: its gradient, a view of k equal rows, is copied for the rows, unless k is 1.

    Autocast asks for an fp32 result, which CUDA's kernel writes from 16-bit numbers without a copy (`make_reduction_from_ty`).
    """
    *tokens, _, h = x.dims
    node = f.record(_summed_backward, (x,), x.dims, x.dtype)
    return f.new((*tokens, h), "fp32" if f.autocast else x.dtype, "sum", node)


def _summed_backward(f: Tape, node: Node, saved: tuple[Dims, str], g: Tensor) -> Tensor:
    dims, dtype = saved
    return g.view(dims) if (dims[-2], dtype) == (1, g.dtype) else f.new(dims, dtype, "clone")


def chunked_gate(activation: Gate) -> Gate:
    """`_default_apply_gate`: the activation of the first half, times the second."""

    def apply(f: Tape, x: Tensor) -> Tensor:
        *rows, width = x.dims
        assert isinstance(width, int)
        half = (*rows, width // 2)
        gate, up = split(f, x, (half, half))
        return ops.mul(f, activation(f, gate), up)

    return apply


def experts(
    f: Tape, x: Tensor, indices: Tensor, weights: Tensor, params: Stacked, gate: Gate, *, kernel: bool, transposed: bool
) -> Tensor:
    """The module of fused experts, which is called on hidden states, indices and weights."""
    own = tuple(params.params.values())
    return f.call(
        *(params.part.name, own[0].layer, own, (x, indices, weights)),
        lambda inputs: _grouped_forward(f, *inputs, params, gate, kernel=kernel, transposed=transposed),
    )


def _grouped_forward(
    f: Tape, x: Tensor, indices: Tensor, weights: Tensor, params: Stacked, gate: Gate, *, kernel: bool, transposed: bool
) -> Tensor:
    """`grouped_mm_experts_forward` over `params`: gate_up_proj, up_proj of experts without gate, down_proj, biases."""
    dtype = x.dtype
    into = "gate_up_proj" if "gate_up_proj" in params else "up_proj"
    e, *first = params.dims(into)
    _, *second = params.dims("down_proj")
    wide, h = (first[1], second[1]) if transposed else (first[0], second[0])
    rows = indices.dims
    ids, order = f.new(rows, "int64", "sort"), f.new(rows, "int64", "sort")
    chosen = taken(f, x, f.new(rows, "int64", "floor_divide"), (*rows, x.dims[-1]))
    weights = taken(f, weights, order, rows)
    _counted = f.new(rows, "int32", "to"), f.new((e,), "int32", "histc")
    offsets = f.new((e,), "int32", "cumsum")
    weight = params[into]
    bias = _bias(f, params, f"{into}_bias", ids)
    out = grouped(f, chosen, weight, wide, kernel=kernel, bias=bias, offsets=offsets, transposed=transposed)
    out = gate(f, out)
    weight = params["down_proj"]
    bias = _bias(f, params, "down_proj_bias", ids)
    out = grouped(f, out, weight, h, kernel=kernel, bias=bias, offsets=offsets, transposed=transposed)
    added = weighted(f, out, weights.view((*rows, 1)))
    back = f.new(rows, "int64", "empty_like")
    added = taken(f, added, back, added.dims)
    total = summed(f, added)
    narrow: Tensor = f.to(total, dtype)
    return narrow


def _bias(f: Tape, params: Stacked, name: str, ids: Tensor) -> Tensor | None:
    """The bias of each row's expert."""
    if name not in params:
        return None
    return taken(f, params[name], ids, (*ids.dims, params.dims(name)[1]))
