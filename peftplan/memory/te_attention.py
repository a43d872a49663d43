"""Attention of Transformer Engine over rows of documents, which cuDNN's fused kernels compute.

Letters: b rows of s tokens, behind each other; a query heads, g key/value heads, d head size; queries, keys and values are
(b, heads, s, d).
Source: transformer-engine 2.20.2, csrc/extensions/attention.cpp (`fused_attn_fwd`, `fused_attn_bwd`), common/fused_attn/
fused_attn_f16_arbitrary_seqlen.cu, utils.cu (`get_max_tokens`); of ranks that share rows,
pytorch/attention/dot_product_attention/context_parallel.py (`AttnFuncWithCPAndKVP2P`); cudnn-frontend 1.23,
node/scaled_dot_product_flash_attention.h (`get_fe_workspace_size_node`). Left out: a workspace that cuDNN's plan may ask for
beside that of its frontend, and where documents begin, some bytes for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peftplan.arrays import Derived, Size, larger
from peftplan.memory.ring_attention import Ring, half
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

FEWEST_TOKENS, DOUBLED_TOKENS = 2**10, 2**15
SIDE = 5
"""The stream of every other turn, besides those of FSDP2 (`distributed.fsdp2`)."""


class PlannedTokens(Derived):
    """Tokens for which a plan is tensors: a power of two, or a multiple of the largest of them."""

    def at(self, sizes: Mapping[str, Size]) -> Size:
        tokens = sizes["b"] * sizes["s/2" if self == HALF_PLANNED else "s"]
        powers = range(FEWEST_TOKENS.bit_length() - 1, DOUBLED_TOKENS.bit_length() - 1)
        planned = -(-tokens // DOUBLED_TOKENS) * DOUBLED_TOKENS * (tokens > DOUBLED_TOKENS)
        doubled = tokens - tokens + FEWEST_TOKENS
        for power in powers:
            doubled = doubled + (tokens > 2**power) * 2**power
        return larger(planned, doubled)


PLANNED, HALF_PLANNED = PlannedTokens("b·s^"), PlannedTokens("b·s/2^")


def of_documents(
    f: Tape, q: Tensor, k: Tensor, v: Tensor, *, packed: bool = True, offset: Operand | None = None, bias: Tensor | None = None
) -> Tensor:
    """Keeps q, k, v, its output, and an fp32 number for each query and head. `packed`: rows are one row of documents. `offset`:
    a number for each head beside the softmax's sum; `bias`: of scores of rows that lie apart, kept too."""
    b, a, s, _ = q.dims
    inputs = (q, k, v) if offset is None else (q, k, v, offset)
    node = f.record(_backward if packed else _backward_of_rows, inputs, q.detach(), k.detach(), v.detach())
    out, rng_state, statistics = _forward(f, (b, s, a, v.dims[3]), q.dtype, node)
    f.keep(node, out.detach(), statistics, rng_state, *(() if bias is None else (bias,)))
    return out.view((b, a, s, v.dims[3]))


def _forward(f: Tape, dims: Dims, dtype: str, node: Node | None = None, stream: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (
        f.new(dims, dtype, "attention of documents", node),
        f.new((2,), "int64", "rng state"),
        f.new(dims[:3], "fp32", "statistics"),
    )
    for tensor in tensors:
        _on(f, tensor, stream)
    return tensors


def _on(f: Tape, tensor: Tensor, stream: int) -> Tensor:
    if stream:
        assert tensor.storage is not None
        f.streams[tensor.storage.number] = stream
    return tensor


def _backward(f: Tape, node: Node, saved: Sequence[Tensor], g: Tensor) -> Gradients:
    q, k, v = saved[:3]
    of_rows = _gradients(f, *((x.dims[0], x.dims[2], x.dims[1], x.dims[3]) for x in (q, k, v)), dtype=q.dtype)
    return of_rows if len(node.edges) == 3 else (*of_rows, _of_offset(f, node, q))


def _backward_of_rows(f: Tape, node: Node, saved: Sequence[Tensor], g: Tensor) -> Gradients:
    """Of rows that lie apart: dQ in fp32, and a number for each query and head. A bias gets a gradient that nothing asks for."""
    tensors = tuple(f.new((x.dims[0], x.dims[2], x.dims[1], x.dims[3]), x.dtype, "attention backward") for x in saved[:3])
    _of_bias = [f.new(bias.dims, bias.dtype, "bias gradient") for bias in saved[6:]]
    b, a, s, d = saved[0].dims
    _workspace = f.new((b, s, a, int(d) + 1), "fp32", "workspace")
    return tensors if len(node.edges) == 3 else (*tensors, _of_offset(f, node, saved[0]))


def _of_offset(f: Tape, node: Node, q: Tensor) -> Tensor | None:
    return f.new((q.dims[1],), "fp32", "softmax offset") if node.edges[3] else None


def _gradients(f: Tape, q: Dims, k: Dims, v: Dims, *, dtype: str, halves: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Of tensors that lie token by token, beside the frontend's workspace: dQ in fp32 and a number for each query and head, and,
    of grouped heads, dK and dV of all query heads. `halves`: half of the tokens of "q" or of "kv" takes part."""
    tensors = f.new(q, dtype, "dq"), f.new(k, dtype, "dk"), f.new(v, dtype, "dv")
    _workspace = f.new((HALF_PLANNED if halves == "q" else PLANNED, q[2], int(q[3]) + 1), "fp32", "workspace")
    if k[2] != q[2]:
        _expanded = f.new((HALF_PLANNED if halves == "kv" else PLANNED, q[2], int(k[3]) + int(v[3])), "fp32", "workspace")
    return tensors


def ring_of_documents(f: Tape, ring: Ring, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in turns, of which every other one has a stream of its own; keys and values go around the ring."""
    node = f.record(_ring_backward, (q, k, v), q.detach(), ring)
    b, a, s, d = q.dims
    buffers: list[Tensor | None] = [f.new((2, *k.dims), k.dtype, "cat"), None]
    outs: list[Tensor | None] = [None, None]
    statistics: list[Tensor | None] = [None, None]
    states: list[Tensor] = []
    out = lse = parts = old = None
    for turn in range(ring.ranks + 1):
        stream, before = (SIDE if turn % 2 else 0), (0 if turn % 2 else SIDE)
        if turn < ring.ranks:
            halves = ring.halves_queries(turn)
            if turn < ring.ranks - 1:
                buffers[(turn + 1) % 2] = _on(f, f.new((2, *k.dims), k.dtype, "keys and values"), stream)
            if turn:
                shapes = ((b, half(s), a, d),) if halves else ((b, half(s), k.dims[1], d),) * 2
                parts = [_on(f, f.new(dims, q.dtype, "half"), stream) for dims in shapes]
            outs[turn % 2], state, statistics[turn % 2] = _forward(f, (b, half(s) if halves else s, a, d), q.dtype, stream=stream)
            states.append(state)
        if turn:
            last = statistics[(turn - 1) % 2]
            assert last is not None
            statistics[(turn - 1) % 2] = last = _on(f, f.new(last.dims, "fp32", "contiguous"), before)
            old = _on(f, f.new((b, s, a), "fp32", "clone"), before)
            if turn == 1:
                lse, old = old, None
                out = f.new((b, s, a, d), q.dtype, "clone", node)
    del buffers[ring.ranks % 2], parts, old
    assert out is not None
    assert lse is not None
    f.keep(node, out.detach(), lse, *buffers, *states)
    outs.clear()
    statistics.clear()
    return out.view((b, a, s, d))


def _ring_backward(f: Tape, node: Node, saved: Sequence[object], g: Tensor) -> Gradients:
    """Gradients of keys and values go around the ring beside them, in the dtype that the kernel gives them."""
    q, ring, _, _, both = saved[:5]
    assert isinstance(q, Tensor)
    assert isinstance(ring, Ring)
    assert isinstance(both, Tensor)
    b, a, s, d = q.dims
    keys = both.dims[1:]
    if ring.joins:
        _half_lse = f.new((b, half(s), a), "fp32", "half")
        _half_lse = f.new((b, half(s), a), "fp32", "contiguous")
    _lse = f.new((b, s, a), "fp32", "contiguous")
    dq = f.new((b, s, a, d), q.dtype, "dq")
    buffers = [f.new((2, *both.dims), q.dtype, "keys, values and their gradients") for _ in "ab"]
    of_turn = parts = None
    for turn in range(ring.ranks):
        whole = turn == ring.ranks - 1
        of_queries = not whole and turn < ring.ranks - ring.place - 1
        rows, of_keys = (b, half(s) if of_queries else s, a, d), (b, half(s) if not whole and not of_queries else s, keys[1], d)
        parts = [] if whole else [f.new(dims, q.dtype, "half") for dims in ([rows] * 3 if of_queries else [of_keys] * 2)]
        halves = "" if whole else ("q" if of_queries else "kv")
        of_turn = _gradients(f, rows, of_keys, of_keys, dtype=q.dtype, halves=halves)
    last = f.view_of(buffers[ring.ranks % 2])
    del of_turn, parts, buffers
    return dq, Tensor(last.storage, keys, q.dtype), Tensor(last.storage, keys, q.dtype)
