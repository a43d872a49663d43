"""torch's math kernel: attention as plain operations, where neither FlashAttention nor the memory-efficient kernel can run.

Letters: b batch, a query heads, g key/value heads, s queries, k keys, d head size.
Source: torch, aten/src/ATen/native/transformers/attention.cpp (`_scaled_dot_product_attention_math`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from peftplan.arch.blocks import Attention
from peftplan.dtypes import SIXTEEN_BITS
from peftplan.ledger import Dim
from peftplan.memory.attention_layout import batched, for_all, repeat_kv
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Tensor

if TYPE_CHECKING:
    from peftplan.memory.model import Model


def math(
    model: Model,
    a: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    by_head: bool = False,
    cached: bool | None = None,
) -> Tensor:
    """The math kernel: plain operations; 16-bit inputs are computed in fp32. Both sides are scaled by the root of the scale.

    Its second result, the weights in the inputs' dtype, is made before the first and thrown away. `by_head`: queries and keys lie
    (b, heads, s, d), as copies that the class made.
    """
    f = model.tape
    dtype = q.dtype
    wide = "fp32" if dtype in SIXTEEN_BITS else dtype
    q, k, v = f.to(q, wide), f.to(k, wide), f.to(v, wide)
    scaled = ops.scale(f, q)
    s, keys = q.dims[2], k.dims[2]
    seen = _lower_triangle(f, (s, keys)) if mask is None and a.causal else mask
    bias = seen
    if seen is not None and seen.dtype == "bool":
        dims = seen.dims if mask is None else (q.dims[0], *seen.dims[1:])  # of all samples, whose rows are one view (`expand`)
        bias = f.new(dims, wide, "mask")
        unseen = f.new(dims, "bool", "logical_not")
        del unseen
    del seen
    heads, values = (repeat_kv(f, x, a) if x.dims[1] == a.num_key_value_heads else x for x in (k, v))  # else it is repeated
    broadcast = q.dims[1] != heads.dims[1]
    copied = a.num_attention_heads != a.num_key_value_heads or ((model.joins if cached is None else cached) and not broadcast)
    spread = partial(_math_copy, model, heads=q.dims[1], broadcast=broadcast, copied=copied)
    scaled_keys = ops.scale(f, heads)
    scores = _scores(
        f,
        scaled if by_head else batched(model, scaled),
        scaled_keys if by_head and not broadcast else spread(scaled_keys),
    )
    del scaled_keys
    if bias is not None:
        scores = ops.add_(f, scores, bias)
    weights = ops.keeps_output(f, scores, "softmax", passing=True)
    hidden = f.new(scores.dims, "bool", "eq -inf")  # `_safe_softmax`
    del scores, hidden
    weights = ops.dropout(f, weights, dropout)
    _low = f.to(weights.detach(), dtype)
    out = products.matmul(f, weights, spread(values), (*q.dims[:3], v.dims[3]))
    out = ops.heads(f, out, out.dims, clones=model.running.batch_size > 1)
    return f.to(out, dtype)


def _lower_triangle(f: Tape, dims: Dims) -> Tensor:
    """`ones({L, S}).tril()`, the boolean mask of causal attention."""
    ones = f.new(dims, "bool", "ones")
    seen = f.new(dims, "bool", "tril")
    del ones
    return seen


def _math_copy(model: Model, x: Tensor, *, heads: Dim, broadcast: bool, copied: bool) -> Tensor:
    """Keys or values as `matmul` takes them: a copy per query head, or one in head order."""
    if broadcast:
        return for_all(model, x, heads)
    return x if copied else batched(model, x)


def _scores(f: Tape, q: Tensor, k: Tensor) -> Tensor:
    return products.matmul(f, q, k, (*q.dims[:3], k.dims[2]), transposed=True)
