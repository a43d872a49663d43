"""Log-probabilities of completions by a head that trains, as Unsloth takes them: forward keeps sums, backward makes logits again.

n tokens of completions, h hidden size, v vocabulary. Source: unsloth_zoo 2026.10.9 `fused_losses/fused_linear.py`
(`_logprobs_impl`, `_tiled_layout`, `_logprobs_bwd_impl`, `_bwd_layout`); as on a card of over 24.5 GiB, of which 4 GiB or more
are free, of up to 4,096 tokens. Left out: numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from peftplan.arrays import Derived, Size, larger, smaller
from peftplan.dtypes import ITEMSIZE
from peftplan.job.loss_sizes import SPLIT_COLUMNS
from peftplan.ledger import Dim
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Operand, Tensor
from peftplan.units import MIB, ceil_div

TILE_BYTES, TOP_COLUMNS = 256 * MIB, 128
"""Of a tile of logits (`_BWD_TILE_BYTES`), and columns of the vocabulary with one largest logit (`_TOP_COLS`)."""
STATISTICS = 8
"""fp32 numbers per token and split of the vocabulary."""


class TileColumns(Derived):
    """Columns of a tile of n tokens' logits within `TILE_BYTES`, a multiple of a block, of all columns at most."""

    columns: int
    block: int
    itemsize: int

    def __new__(cls, columns: int, block: int, itemsize: int) -> TileColumns:
        """The size called by what it counts."""
        self = super().__new__(cls, f"columns of {columns} by {block}")
        self.columns, self.block, self.itemsize = columns, block, itemsize
        return self

    def __getnewargs__(self) -> tuple[int, int, int]:  # type: ignore[override]
        """What a copy is made of."""
        return self.columns, self.block, self.itemsize

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """Their number at these sizes, which may be arrays as well as integers."""
        fitting = TILE_BYTES // (larger(sizes["n"], 1) * self.itemsize)
        return smaller(larger(fitting // self.block, 1) * self.block, self.columns)


def of_trained_head(f: Tape, hidden: Tensor, weight: Operand) -> Tensor:
    """`_logprobs_impl` of a head that trains: forward keeps two sums per token and the largest logits of each block of the
    vocabulary, and backward makes the logits again (`_logprobs_bwd_impl`)."""
    vocab = weight.dims[0]
    assert isinstance(vocab, int)
    node = f.record(_backward, (hidden, weight))
    if node is not None:
        node.in_python = True
    indices = f.new(("n",), "int64", "kept")
    sums = f.new(("n",), "fp32", "logps"), f.new(("n",), "fp32", "lse")
    tops = f.new(("n", 2 * ceil_div(vocab, TOP_COLUMNS)), "fp32", "block_top")
    splits = ceil_div(vocab, SPLIT_COLUMNS)
    buffer = _logits(f, TileColumns(splits * SPLIT_COLUMNS, SPLIT_COLUMNS, ITEMSIZE["fp32"]), "fp32")
    chunk = hidden if hidden.dtype == weight.dtype else f.new(hidden.dims, weight.dtype, "to")
    partial = f.new((STATISTICS, splits, "n"), "fp32", "part")
    f.products.append((len(f.log), "cuBLAS"))
    del chunk, partial, buffer
    loss = f.new((), "fp32", "sum", node)
    f.keep(node, hidden, weight, indices, *sums, tops)
    return loss


def _backward(f: Tape, node: Node, saved: tuple[Tensor, ...], g: Tensor) -> Gradients:
    hidden, weight, *_ = saved
    vocab, width = weight.dims
    assert isinstance(vocab, int)
    grad_hidden = f.new(hidden.dims, hidden.dtype, "grad_h")
    grad_weight = f.new(weight.dims, weight.dtype, "grad_w")
    buffer = _logits(f, TileColumns(vocab, TOP_COLUMNS, ITEMSIZE[weight.dtype]), weight.dtype)
    chunk = hidden if hidden.dtype == weight.dtype else f.new(hidden.dims, weight.dtype, "to")
    sums = f.new(("n", width), "fp32", "acc_h")
    f.products.append((len(f.log), "cuBLAS"))
    del chunk, sums, buffer
    return [grad_hidden, grad_weight]


def _logits(f: Tape, columns: Dim, dtype: str) -> Tensor:
    buffer = f.new(("n", columns), dtype, "logits, a tile")
    assert buffer.storage is not None
    f.category[buffer.storage.number] = "logits"
    return buffer
