"""DeepEP's exchange of tokens between the ranks that own experts, as NeMo Automodel calls it, and the order of their rows.

Letters: n tokens of a rank, k experts a token, e experts, W ranks that own them once. A rank gets m tokens, each once, and n·k
rows of them for its experts, which have dims (b, s, k, …). Sources: nemo_automodel 0.7.0, components/moe/megatron/
(fused_indices_converter.py, token_dispatcher.py, fused_a2a.py); DeepEP at 94a9f8f6, csrc/deep_ep.cpp (`intranode_dispatch`,
`internode_dispatch`, `intranode_combine`); transformer-engine 2.20.2, pytorch/permutation.py, pytorch/triton/permutation.py. Left
out: DeepEP's buffers for what ranks send, which it takes from CUDA itself, beside torch's allocator.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import comb

from peftplan.arrays import Derived, Size
from peftplan.memory.fused_attention import number
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor

SHARE = 2**20
GPUS_OF_NODE = 8
"""Ranks that reach each other by NVLink (`NUM_MAX_NVL_PEERS`)."""


class Received(Derived):
    """Tokens that a rank gets once, if all choices of experts are as likely: named by their number for 2**20 of its own."""

    def at(self, sizes: Mapping[str, Size]) -> Size:
        return sizes["b"] * sizes["s"] * int(self.rpartition("·")[2].partition("/")[0]) // SHARE


def received(ranks: int, experts: int, k: int, *, in_turn: bool = False) -> Received:
    """W · (1 - C(e - e/W, k) / C(e, k)) for each token: on how many ranks it has an expert. That is an assumption.
    `in_turn`: what the first rank gets of e tokens that take experts in turn."""
    if in_turn:
        here = sum(any((token * k + place) % experts < experts // ranks for place in range(k)) for token in range(experts))
        return Received(f"b·s·{ranks * here * SHARE // experts}/{SHARE}")
    missed = comb(experts - experts // ranks, k) * SHARE // comb(experts, k)
    return Received(f"b·s·{ranks * (SHARE - missed)}/{SHARE}")


def dispatched(
    f: Tape, x: Tensor, weights: Tensor, ranks: int, tokens: Received, *, replays: bool, passing: Received | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """`FusedDispatch`: each token once for each rank that owns one of its experts, and the weights of these. `replays`:
    recomputation finds where tokens went, and their weights (`DispatchReplayRecorder`). `passing`: tokens that a rank gets from
    other nodes for all ranks of its own."""
    node = f.record(_dispatched_backward, (x, weights), x.dims, weights.dims)
    k, of_ranks = weights.dims[-1], (*x.dims[:-1], ranks)
    nodes = -(-ranks // GPUS_OF_NODE)

    def layout() -> tuple[Tensor, ...]:
        return (
            f.new(of_ranks, "bool", "is token in rank"),
            f.new((tokens,), "int32" if nodes == 1 else "int64", "source"),
            *(_heads_of_nodes(f, x.dims[:-1], nodes, passing) if passing else (f.new(of_ranks, "int32", "send head"),)),
            f.new((tokens, k), "int64", "experts"),
            f.new((tokens, k), "fp32", "weights"),
        )

    *handle, _of_experts, of_got = f.chosen(layout) if replays else layout()
    got = f.new((tokens, x.dims[-1]), x.dtype, "dispatch", node)
    if replays and f.replays:
        scratch = f.new((tokens,), "int32", "source"), f.new(of_ranks, "int32", "send head")
        del scratch
    if node is not None:
        node.in_python = True
        node.context = handle
    return got, Tensor(of_got.storage, (tokens, k), "fp32", node, 1), tuple(handle)


def _heads_of_nodes(f: Tape, own: Dims, nodes: int, passing: Received) -> tuple[Tensor, Tensor]:
    """Where tokens went by RDMA, and on to the ranks of this node."""
    return f.new((*own, nodes), "int32", "send head of nodes"), f.new((passing, GPUS_OF_NODE), "int32", "send head")


def _dispatched_backward(f: Tape, node: Node, saved: tuple[Dims, Dims], g: Tensor, h: Tensor) -> Gradients:
    weights = f.new(saved[1], "fp32", "combine")
    return f.new(saved[0], g.dtype, "combine"), weights


def on_own(f: Tape, weights: Tensor, owned: int) -> tuple[Tensor, Tensor]:
    """`IndicesToMultihot`: keeps where each weight was."""
    dims = (weights.dims[0], owned)
    marks = f.new(dims, "bool", "multihot")
    node = f.record(_on_own_backward, (weights,), weights.dims)
    out = f.new(dims, "fp32", "multihot", node)
    f.keep(node, f.new(dims, "int32", "position map"))
    return marks, out


def _on_own_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor], g: Tensor) -> Tensor:
    marks = f.new(g.dims, "bool", "zeros")
    out = f.new(saved[0], g.dtype, "multihot")
    del marks
    return out


def permuted(f: Tape, x: Tensor, weights: Tensor, rows: Dims) -> tuple[Tensor, Tensor, Tensor]:
    """`moe_permute_with_probs`: a row for each expert of each token, its weight, and where the rows come from."""
    m, owned = weights.dims
    row_map = f.new((m, 2 * number(owned) + 1), "int32", "row map")
    node = f.record(_permuted_backward, (x, weights), x.dims, weights.dims, row_map)
    out = f.new((*rows, x.dims[-1]), x.dtype, "permute", node)
    of_rows = f.new(rows, "fp32", "permuted weights")
    if node is not None:
        node.in_python = True
    return out, Tensor(of_rows.storage, (*rows, 1), "fp32", node, 1), row_map


def _permuted_backward(f: Tape, node: Node, saved: tuple[Dims, Dims, Tensor], g: Tensor, h: Tensor) -> Gradients:
    return f.new(saved[0], g.dtype, "unpermute"), f.new(saved[1], "fp32", "unpermute")


def unpermuted(f: Tape, x: Tensor, tokens: Received, row_map: Tensor) -> Tensor:
    """`moe_unpermute`: a row for each token that this rank got, made before what it saves ends a recomputation."""
    out = f.new((tokens, x.dims[-1]), x.dtype, "unpermute")
    return Tensor(out.storage, out.dims, out.dtype, f.record(_unpermuted_backward, (x,), x.dims, row_map))


def _unpermuted_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "permute")


def combined(f: Tape, x: Tensor, dims: Dims, handle: object) -> Tensor:
    """`FusedCombine`: a row for each token of this rank's own."""
    return f.new(dims, x.dtype, "combine", f.record(_combined_backward, (x,), x.dims, handle))


def _combined_backward(f: Tape, node: Node, saved: tuple[Dims, object], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "dispatch")
