"""The gated delta rule as one autograd function of flash-linear-attention.

Letters: b batch, s sequence, n heads of values, k and v numbers of a head. All of it is in the dtype of the hidden states, but
decays and norms. Forward saves the normed queries and keys, the values, and what each chunk of tokens solved; backward makes
the states of all chunks again. Gradients of all heads are summed where several share a key. Left out: what Triton's autotuner
takes in the first step. Source: `job.kernels`, ops/gated_delta_rule/chunk.py and what it calls (chunk_fwd.py, wy_fast.py,
ops/common/chunk_o.py, chunk_delta_h.py, modules/l2norm.py).
"""

from __future__ import annotations

from typing import TypeAlias

from peftplan.arch.blocks import DeltaRule
from peftplan.memory.delta_rule import CHUNK
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor

TILE = 64
"""Numbers of a key that a program of `chunk_bwd_dqkwg` reads at once on an A100; 128 on an H100."""
Saved: TypeAlias = tuple[DeltaRule, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def by_flash_linear_attention(f: Tape, delta: DeltaRule, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """`chunk_gated_delta_rule` without a state before the row, or one asked for behind it; q, k and v are views of one tensor."""
    b, s, n = v.dims[0], v.dims[1], delta.value_heads
    node = f.record(_rule_backward, (q, k, v, decay, beta))
    if node is not None:
        node.in_python = True
    _q, _k, v = (f.new(x.dims, x.dtype, "contiguous") for x in (q, k, v))
    normed_q, root_q, normed_k, root_k = (*_normed(f, q), *_normed(f, k))
    sums = f.new(decay.dims, "fp32", "chunk_local_cumsum")
    solved = f.new((b, s, n, CHUNK), v.dtype, "A")
    states = _weighted(f, delta, v), _states(f, delta, v)
    out = f.new(v.dims, v.dtype, "o", node)
    del states
    f.keep(node, delta, normed_q, root_q, normed_k, root_k, v, sums, beta.detach(), solved)
    return out


def _normed(f: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    """`l2norm_fwd`: x normed, and what it was divided by."""
    return f.new(x.dims, x.dtype, "l2norm"), f.new(x.dims[:-1], "fp32", "rstd")


def _weighted(f: Tape, delta: DeltaRule, v: Tensor) -> tuple[Tensor, Tensor]:
    """`recompute_w_u_fwd`."""
    return f.new((*v.dims[:-1], delta.key_dim), v.dtype, "w"), f.new(v.dims, v.dtype, "u")


def _states(f: Tape, delta: DeltaRule, v: Tensor) -> tuple[Tensor, Tensor]:
    """`chunk_gated_delta_rule_fwd_h`: the state before each chunk, and values."""
    return f.new(_of_states(delta, v.dims), v.dtype, "h"), f.new(v.dims, v.dtype, "v_new")


def _of_states(delta: DeltaRule, dims: Dims) -> Dims:
    b, s, n, _ = dims
    return (b, f"{s}/{CHUNK}", n, delta.key_dim, delta.value_dim)


def _rule_backward(f: Tape, node: Node, saved: Saved, g: Tensor) -> Gradients:
    delta, q, _, _, _, v, sums, beta, _ = saved
    states = _weighted(f, delta, v), _states(f, delta, v)
    grad_v = f.new(v.dims, v.dtype, "dv")
    grad_states = f.new(_of_states(delta, v.dims), v.dtype, "dh")
    grad_v = f.new(v.dims, v.dtype, "dv2")
    of_heads = (*v.dims[:-1], delta.key_dim)
    grad_q, grad_k = (f.new(of_heads, q.dtype, name) for name in ("dq", "dk"))
    parts = f.new((-(-delta.key_dim // TILE), *sums.dims), "fp32", "dg of each tile")
    grad_w = f.new(of_heads, q.dtype, "dw")
    if q.dims != of_heads:
        grad_q = f.new(q.dims, q.dtype, "sum")
        grad_k = f.new(q.dims, q.dtype, "sum")
    grad_sums = f.new(sums.dims, "fp32", "sum")
    del parts
    added = f.new(of_heads, q.dtype, "dk2")
    grad_v = f.new(v.dims, v.dtype, "dv")
    added_sums = f.new(sums.dims, "fp32", "dg2")
    grad_beta = f.new(beta.dims, beta.dtype, "db")
    if q.dims != of_heads:
        added = f.new(q.dims, q.dtype, "sum")
    grad_sums = f.new(sums.dims, "fp32", "chunk_local_cumsum")
    del states, grad_states, grad_w, added, added_sums
    grad_q = f.new(q.dims, q.dtype, "l2norm_bwd")
    grad_k = f.new(q.dims, q.dtype, "l2norm_bwd")
    return grad_q, grad_k, grad_v, grad_sums, grad_beta
