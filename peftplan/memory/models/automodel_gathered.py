"""Experts that ranks divide without an exchange of tokens: each rank gathers the tokens of all, and sums what all experts give.

Letters: W ranks that own the experts once; gathered tokens have dims (b, s, W, …). Source: nemo_automodel 0.7.0,
components/moe/experts.py (`GroupedExperts.forward`, `_gather_ep_inputs`, `_AllGatherConcatVarlenFn`); torch,
distributed/nn/functional.py (`_AllReduce`), csrc/distributed/c10d/ProcessGroupNCCL.cpp (`allgather`).
"""

from __future__ import annotations

from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor


def gathered(f: Tape, x: Tensor, ranks: int) -> Tensor:
    """x of all ranks, first as one tensor each, into which NCCL's result is copied."""
    *tokens, width = x.dims
    parts = f.many(x.dims, x.dtype, "empty_like", ranks)
    flat = f.new((*tokens, ranks, width), x.dtype, "all-gather")
    del flat
    node = f.record(_gathered_backward, (x,), x.dims)
    out = f.new((*tokens, ranks, width), x.dtype, "cat", node)
    if node is not None:
        node.in_python = True
    del parts
    return out


def _gathered_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    """The gradients are summed in place; that of this rank's tokens is a view."""
    return f.view_of(Tensor(g.storage, saved[0], g.dtype))


def summed(f: Tape, total: Tensor, x: Tensor, dims: Dims) -> Tensor:
    """The sum over ranks of `total`, to which a zero is added that keeps the gathered tokens `x` in the graph, and of it the
    tokens of this rank."""
    total = Tensor(total.storage, total.dims, total.dtype, f.record(_kept_backward, (total, x), x.dims, x.dtype))
    out = f.new(total.dims, total.dtype, "all-reduce", f.record(_copied_backward, (total,)))
    return Tensor(out.storage, dims, out.dtype, f.record(_narrowed_backward, (out,), out.dims))


def _kept_backward(f: Tape, node: Node, saved: tuple[Dims, str], g: Tensor) -> Gradients:
    return g, f.new(saved[0], saved[1], "expand") if node.edges[1] else None


def _copied_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "all-reduce")


def _narrowed_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "zeros")
