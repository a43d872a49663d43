"""Experts that ranks divide, one after the other, over the tokens that each rank gathers of all (`backend.experts` torch).

Letters: W ranks that own the experts once; gathered tokens have dims (b, s, W, …). Every expert gets as many rows as any other.
Source: nemo_automodel 0.7.0, components/moe/experts.py (`GroupedExperts.forward`, `_forward_loop`), megatron/moe_utils.py
(`WeightedSwiGLUFunction`); torch, derivatives.yaml (`gather`, `scatter_add_`, `select`). Left out: the mask of padded tokens, and
what `nonzero` counts with.
"""

from __future__ import annotations

from peftplan.memory.experts import taken, to_local
from peftplan.memory.fused_attention import number
from peftplan.memory.models.automodel_ep import gated
from peftplan.memory.models.automodel_gathered import gathered, summed
from peftplan.memory.models.expert_loop import RowsOfOne
from peftplan.memory.models.style import Call
from peftplan.tape import products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor


def in_a_loop(c: Call, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """`GroupedExperts.forward` with `_forward_loop`: the sum of what a token's experts add is made in fp32."""
    f, mlp = c.at("mlp.experts"), c.block.mlp
    params = c.model.part(f"{c.style.stack}.mlp.experts", c.number).params
    owned = number(params["gate_up_proj"].dims[0])
    up, down = (to_local(f, params[matrix]) for matrix in ("gate_up_proj", "down_proj"))
    own, ranks = x.dims, mlp.num_experts // owned
    rows = RowsOfOne(own[:-1], mlp.num_experts_per_tok, owned)
    weights = f.to(weights, "fp32")
    x, weights, indices = (gathered(f, y, ranks) for y in (x, weights, indices))
    total = f.new(x.dims, "fp32", "zeros")
    for _ in range(owned):
        total = one(f, x, weights, indices, up, down, total, rows)
    return f.to(summed(f, total, x, own), x.dtype)


def one(
    f: Tape, x: Tensor, weights: Tensor, indices: Tensor, up: Operand, down: Operand, total: Tensor, rows: RowsOfOne
) -> Tensor:
    """What an expert adds to the tokens that chose it."""
    equal = f.new(indices.dims, "bool", "eq")
    _mask = f.new(indices.dims, "bool", "logical_and")
    del equal
    places = f.new((rows, 2), "int64", "nonzero")
    second = selected(f, down)
    chosen = _rows_of(f, x, places, (rows, x.dims[-1]))
    out = products.linear(f, chosen, selected(f, up))
    of_rows = taken(f, weights, places, (rows, 1))
    active = gated(f, out, of_rows)
    added = products.linear(f, active, second)
    node = f.record(_added_backward, (total, f.to(added, "fp32")), places, (rows, x.dims[-1]))
    return Tensor(total.storage, total.dims, total.dtype, node)


def selected(f: Tape, weights: Operand) -> Operand:
    """One expert's matrix of all that a rank owns, whose gradient is as large as that of all."""
    node = f.record(_selected_backward, (weights,), weights.dims)
    return Tensor(None, weights.dims[1:], weights.dtype, node)


def _selected_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "select_backward")


def _rows_of(f: Tape, x: Tensor, places: Tensor, dims: Dims) -> Tensor:
    """`x.gather`: keeps x and the places; its gradient is as large as x."""
    return f.new(dims, x.dtype, "gather", f.record(_rows_backward, (x,), x, places))


def _rows_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0].dims, g.dtype, "gather_backward")


def _added_backward(f: Tape, node: Node, saved: tuple[Tensor, Dims], g: Tensor) -> Gradients:
    return g if node.edges[0] else None, f.new(saved[1], g.dtype, "gather")
