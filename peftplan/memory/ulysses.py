"""Attention of ranks that share each row of tokens by DeepSpeed's Ulysses: each gets all tokens of its part of the heads.

Letters: b batch, s tokens of a rank, `row` tokens of all ranks, a heads, d head size. Before attention each of queries, keys and
values is copied rank by rank, exchanged, and laid head by head; its result is exchanged back. Keys of fewer heads than ranks are
repeated first.

    sent = (ranks, s, b, a/ranks, d)   got = the same of all ranks, (row, b, a/ranks, d)   attention: (b, a/ranks, row, d)

Source: DeepSpeed 0.19.8, runtime/sequence_parallel/ulysses_sp.py (`UlyssesSPAttentionHF.forward`), sequence/layer.py
(`_dim_zero_all_to_all`). Left out: the batches of all ranks that the data loader gathers between steps, in int64.
"""

from __future__ import annotations

from collections.abc import Callable

from peftplan.memory.batch import ROW
from peftplan.memory.fused_attention import number
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor


def by_all_heads(
    f: Tape, ranks: int, q: Tensor, k: Tensor, v: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """`UlyssesSPAttentionHF.forward`; q is (b, a, s, d), k and v are (b, g, s, d). `attend`: attention of whole rows,
    whose result lies token by token."""
    b, heads, s, d = q.dims
    of_ranks = f.new((ranks, b, s), "int64", "position_ids of each rank")
    _positions = f.new((b, ROW), "int64", "position_ids")
    got = [_exchanged(f, ranks, x) for x in (q, k, v)]
    for place, x in enumerate(got):
        got[place] = _by_head(f, x)
        del x
    out = attend(*got)
    del of_ranks
    back = _all_to_all(f, out, out.dims, copies_gradient=True)
    return ops.copied(f, back, "reshape", (b, s, number(heads) * number(d)))


def _exchanged(f: Tape, ranks: int, x: Tensor) -> Tensor:
    """`combine_sequence`: in (b, heads, s, d), out (b, heads of a rank, row, d), token by token."""
    b, heads, s, d = x.dims
    repeats = max(1, ranks // number(heads))
    if repeats > 1:
        dims = (b, ranks, s, d)
        x = f.new(dims, x.dtype, "repeat_interleave", f.record(_repeat_backward, (x,), x.dims))
    local = number(x.dims[1]) // ranks
    sent = ops.copied(f, x, "contiguous") if local == 1 else f.new(x.dims, x.dtype, "contiguous", f.record(_sent_backward, (x,)))
    del x
    return _all_to_all(f, sent, (b, local, ROW, d), copies_gradient=local > 1)


def _by_head(f: Tape, x: Tensor) -> Tensor:
    """`contiguous` of what lies token by token; a single head of a single row does already."""
    return x if x.dims[1] == 1 else ops.copied(f, x, "contiguous")


def _all_to_all(f: Tape, sent: Tensor, dims: Dims, *, copies_gradient: bool) -> Tensor:
    """`_dim_zero_all_to_all`: sends what follows rank by rank; backward copies a gradient that does not, then sends it back."""
    return f.new(dims, sent.dtype, "all_to_all", f.record(_sent_back, (sent,), sent.dims, copies_gradient))


def _sent_back(f: Tape, node: Node, saved: tuple[Dims, bool], g: Tensor) -> Tensor:
    dims, copies = saved
    copy = f.new(g.dims, g.dtype, "contiguous") if copies else None
    back = f.new(dims, g.dtype, "all_to_all")
    del copy
    return back


def _sent_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    """The reshape of heads of several ranks copies what came back rank by rank."""
    return f.new(g.dims, g.dtype, "reshape")


def _repeat_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "sum")
