"""A mixture whose experts run one after the other, as transformers had them before `versions.EXPERTS_FUSED`.

Letters: n tokens (b·s), k experts a token, e experts, h hidden size. Each expert is assumed to get the same number of tokens,
n·k / e. Sources: transformers then, models/mixtral/modeling_mixtral.py (`MixtralSparseMoeBlock.forward`,
`MixtralBlockSparseTop2MLP.forward`); torch, aten/src/ATen/native/cuda/Indexing.cu (`index_put_with_sort_kernel`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from peftplan.arrays import Derived, Size, numel_at
from peftplan.ledger import Dim
from peftplan.memory.activations import activation
from peftplan.memory.experts import divided_in_place, row_sum, taken, top_k, weighted
from peftplan.memory.models.style import Call
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor


class Names(NamedTuple):
    """Names in a layer: the block, and the linear layers of its experts."""

    block: str
    gate: str
    up: str
    down: str


MIXTRAL = Names("block_sparse_moe", "w1", "w3", "w2")
QWEN = Names("mlp", "gate_proj", "up_proj", "down_proj")


class RowsOfOne(Derived):
    """Rows that an expert gets where all get as many."""

    rows: tuple[Dim, ...]
    k: int
    e: int

    def __new__(cls, rows: tuple[Dim, ...], k: int, e: int) -> RowsOfOne:
        """The size called by what it counts."""
        self = super().__new__(cls, f"{'·'.join(map(str, rows))}·{k}/{e}")
        self.rows, self.k, self.e = rows, k, e
        return self

    def __getnewargs__(self) -> tuple[tuple[Dim, ...], int, int]:  # type: ignore[override]
        """What a copy is made of."""
        return self.rows, self.k, self.e

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """The rows at these sizes, which may be arrays as well as integers."""
        rows: Size = -(-numel_at(self.rows, sizes) * self.k // self.e)
        return rows


def looped_block(c: Call, x: Tensor, *, names: Names, normed: bool) -> Tensor:
    """`MixtralSparseMoeBlock.forward`, where `index_add_` keeps what each expert adds. `normed`: weights are divided by their
    sum."""
    rows = ops.reshaped(c.tape, x, (f"b·{c.model.seq}", x.dims[-1]))
    return ops.reshaped(c.tape, looped(c, rows, names=names, normed=normed), x.dims)


def looped(c: Call, x: Tensor, *, names: Names, normed: bool) -> Tensor:
    """What the experts add to the rows of all tokens."""
    f, mlp, dtype = c.tape, c.block.mlp, x.dtype
    e, k = mlp.num_experts, mlp.num_experts_per_tok
    n, h = x.dims
    _logits = c.linear(f"{names.block}.gate", x)
    c.at(names.block)
    weights = ops.softmax(f, _logits, "fp32")
    weights, chosen = top_k(f, weights, k)
    if normed:
        weights = divided_in_place(f, weights, row_sum(f, weights))
    weights = f.to(weights, dtype)
    out = f.new((n, h), dtype, "zeros")
    _mask = f.new((n, k, e), "int64", "one_hot")
    del chosen
    rows = RowsOfOne((n,), k, e)
    for number in range(e):
        c.at(names.block)
        places = f.new((rows, 2), "int64", "nonzero")
        state = _rows_of(f, x, places, (rows, h))
        added = expert(c, state, f"{names.block}.experts.{number}", names)
        c.at(names.block)
        its_weights = taken(f, weights, places, (rows, 1))
        added = weighted(f, added, its_weights)
        del its_weights
        out = _added(f, out, f.to(added, dtype), places)
    return out


def expert(c: Call, x: Tensor, name: str, names: Names) -> Tensor:
    """`MixtralBlockSparseTop2MLP.forward`."""
    gate = activation(c.at(f"{name}.act_fn"), c.linear(f"{name}.{names.gate}", x), c.block.mlp.activation)
    x = ops.mul(c.at(name), gate, c.linear(f"{name}.{names.up}", x))
    del gate
    return c.linear(f"{name}.{names.down}", x)


def _rows_of(f: Tape, x: Tensor, places: Tensor, dims: Dims) -> Tensor:
    """`x[None, rows].reshape(-1, h)`, whose gradient is a view of one as large as x."""
    return f.new(dims, x.dtype, "index", f.record(_rows_backward, (x,), x.dims, places))


def _rows_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor], g: Tensor) -> Tensor:
    return f.view_of(f.new(saved[0], g.dtype, "new_zeros"))


def _added(f: Tape, out: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """`out.index_add_(0, rows, x)`: keeps the rows and x."""
    return Tensor(out.storage, out.dims, out.dtype, f.record(_added_backward, (out, x), x.dims, places, x))


def _added_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor, Tensor], g: Tensor) -> Gradients:
    return g if node.edges[0] else None, f.new(saved[0], g.dtype, "index_select")
