"""Attention: what eager attention and torch's `scaled_dot_product_attention` allocate and save on CUDA.

Letters: b batch, a query heads, g key/value heads, s queries, k keys, d head size. Queries, keys and values are (b, heads, s, d)
views of projections that lie (b, s, heads, d), as transformers makes them.
Sources: torch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (the choice); transformers, integrations/sdpa_attention.py,
models/llama/modeling_llama.py (`eager_attention_forward`). The kernels are in `fused_attention` and `math_attention`, masks in
`masks`, what `matmul` copies in `attention_layout`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.arch.blocks import Attention
from peftplan.dtypes import SIXTEEN_BITS
from peftplan.errors import NeedsTraceError, NoEngineError
from peftplan.job.requirements import check_flash_dtypes
from peftplan.ledger import Dim
from peftplan.memory.attention_layout import by_heads, gathered, joined_width, product, repeat_kv, viewed
from peftplan.memory.fused_attention import HEAD_MULTIPLE, efficient, flash, number, padded_head
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Tensor

if TYPE_CHECKING:
    from peftplan.memory.model import Model

FLASH_CAPABILITY = (8, 0)
"""FlashAttention needs sm80; older cards run the memory-efficient kernel, which has no grouped queries."""
MAX_FLASH_HEAD = 256


def attend(
    model: Model,
    a: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    rotated: bool = True,
    wide: bool = True,
    by_head: bool = False,
    bias: Tensor | None = None,
    cached: bool | None = None,
    moved: bool = False,
) -> Tensor:
    """transformers' attention function; in (b, a, s, d), out (b, s, a·d).

    `rotated`: queries and keys went through rotary embeddings, whose gradients come head by head anyway. `wide`: eager attention
    asks for a softmax in fp32, as decoders do. `bias`: what eager attention adds before the mask. `by_head`: the three lie
    (b, a, s, d), as copies that the class made. `cached`: a cache copied keys and values, which the model itself does not state.
    `moved`: the gradients of keys and values need no copy: a cache copied them, or one projection's gradient joins all three.
    """
    f = model.tape
    if model.running.ulysses > 1 and q.dims[2] == "s":
        return _by_ulysses(model, a, q, k, v)
    if model.running.attention == "eager":
        if not by_head:
            q, k, v = by_heads(f, q, k, v, rotated=rotated, moved=moved)
        return eager(model, a, q, k, v, mask, dropout=dropout, wide=wide, bias=bias, by_head=by_head, cached=cached)
    if model.running.kernels.attention is not None:
        from peftplan.memory.te_attention import of_documents, ring_of_documents

        ring = model.running.ring
        out = of_documents(f, q, k, v) if ring is None else ring_of_documents(f, ring, q, k, v)
        b, heads, s, d = out.dims
        return out.view((b, s, joined_width(heads, d)))
    if model.running.kernels.decoder is not None and not model.running.flash:
        return by_xformers(model, a, q, k, v)
    repeats = repeats_heads(model, a, mask)
    kernel = _kernel(model, q, v, mask, dtype=f.autocast or q.dtype, grouped=q.dims[1] != k.dims[1] and not repeats)
    ring = model.running.ring
    if kernel == "math" or repeats or ring is not None:
        by_head_q, k, v = by_heads(f, q, k, v, rotated=rotated, moved=moved)
        q = by_head_q if kernel == "math" else q
        del by_head_q
    elif not moved and not by_head:
        q, k, v = (x if rotated and x is not v else viewed(model, x) for x in (q, k, v))
    if repeats:
        k, v = (repeat_kv(f, x, a, copies=a.num_key_value_heads > 1) for x in (k, v))
    head = v.dims[3]
    if model.running.attention == "flash_attention_2" and head != q.dims[3]:
        v = padded_head(f, v, q.dims[3])
    _arguments = q, k, v  # of `sdpa_attention_forward`, which live until it returns
    if flattens := model.running.flattens and model.running.attention == "flash_attention_2":  # `_prepare_from_posids`
        q = ops.copied(f, q, "contiguous") if by_head else q
        k, v = (ops.copied(f, x, "contiguous") for x in (k, v)) if by_head or model.caches else (k, v)
    if model.running.attention == "flash_attention_2":
        q, k, v = _of_one_dtype(f, q, k, v)
    elif f.autocast:
        q, k, v = f.cast_all(f.autocast, q, k, v)
    if ring is not None:
        if kernel != "flash":
            raise NoEngineError(f"context parallelism with torch's {kernel} attention (no formula yet)")
        from peftplan.memory.ring_attention import ring_flash

        out = ring_flash(f, ring, q, k, v)
        del q, k, v
        out = ops.copied(f, out, "clone") if ring.joins else out
    elif kernel == "flash":
        of_torch = model.running.attention == "sdpa"
        out = flash(f, q, k, v, copies_output=by_head and of_torch, splits=of_torch and not dropout and model.running.splits_keys)
        del q, k, v  # autocast's copies
        if head != out.dims[3]:
            out = sliced(f, out, (*out.dims[:3], head))
        if model.running.attention == "flash_attention_2":
            del _arguments  # the layer copies the result, once `flash_attention_forward` has returned
        if by_head and not flattens:
            out = ops.copied(f, out, "clone")
    elif kernel == "efficient":
        out = efficient(f, q, k, v, mask, keys=model.length(k.dims[2]))
    else:
        from peftplan.memory.math_attention import math

        autocast, f.autocast = f.autocast, None  # the wrapper that cast the inputs turns it off
        try:
            out = math(model, a, q, k, v, mask, dropout=dropout, by_head=by_head, cached=cached)
        finally:  # a recomputation may stop inside
            f.autocast = autocast
        del q, k, v  # autocast's copies
        out = ops.copied(f, out, "clone")
    b, heads, s, d = out.dims
    return out.view((b, s, joined_width(heads, d)))


def _by_ulysses(model: Model, a: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of whole rows to the heads of one of the ranks that share them."""
    from peftplan.memory.ulysses import by_all_heads

    ranks = model.running.ulysses
    kv_heads = max(1, a.num_key_value_heads // ranks)
    local = a._replace(num_attention_heads=a.num_attention_heads // ranks, num_key_value_heads=kv_heads)

    def of_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(model, local, q, k, v, by_head=local.num_attention_heads > 1)

    return by_all_heads(model.tape, ranks, q, k, v, of_rows)


def by_xformers(model: Model, a: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers' attention as Unsloth calls it on cards without FlashAttention: torch's memory-efficient kernel, of all documents
    of a row at once, on keys and values copied for all heads of queries.

    Sources: unsloth 2026.10.9, utils/attention_dispatch.py (`_run_attention`); xformers 0.0.35, ops/fmha/cutlass.py.
    """
    f = model.tape
    k, v = (repeat_kv(f, x, a) for x in (k, v))
    b, heads, s, d = (out := efficient(f, q, k, v, None, keys=model.length(k.dims[2]))).dims
    return out.view((b, s, joined_width(heads, d)))


def repeats_heads(model: Model, a: Attention, mask: Tensor | None) -> bool:
    """Whether keys and values are repeated for all heads of queries (`use_gqa_in_sdpa`)."""
    grouped = a.num_attention_heads != a.num_key_value_heads
    equal = a.value_head_dim in (None, a.head_dim)
    in_kernel = mask is None and equal and a.head_dim <= MAX_FLASH_HEAD
    return grouped and (model.running.repeats_kv or (model.running.attention == "sdpa" and not in_kernel))


def _of_one_dtype(f: Tape, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What flash-attn gets: queries in fp32 make transformers cast all three (`fa_peft_integration_check`), in this order.

    Raises RefusedError for keys or values of another dtype than the queries.
    """
    if f.autocast and q.dtype == "fp32":
        return f.to(q, f.autocast), f.to(k, f.autocast), f.to(v, f.autocast)
    check_flash_dtypes(q.dtype, k.dtype, v.dtype)
    return q, k, v


def _kernel(model: Model, q: Tensor, v: Tensor, mask: Tensor | None, *, dtype: str, grouped: bool) -> str:
    """The kernel that torch chooses: flash, else memory-efficient, else math (`select_sdp_backend`).

    `dtype`: what the kernel gets. `grouped`: it gets fewer heads of keys than of queries.
    """
    head, running = q.dims[3], model.running
    if running.attention == "flash_attention_2":
        if running.padding or dtype not in SIXTEEN_BITS:
            raise NeedsTraceError("flash_attention_2 with padding or fp32 inputs")
        return "flash"
    if mask is None and dtype in SIXTEEN_BITS and running.flash and _at_most(head, MAX_FLASH_HEAD) and head == v.dims[3]:
        return "flash"
    aligned = not number(head) % (HEAD_MULTIPLE if dtype in SIXTEEN_BITS else HEAD_MULTIPLE // 2)
    known = dtype in ("fp16", "fp32") or (dtype == "bf16" and running.flash)
    return "efficient" if known and aligned and not grouped else "math"


def eager(
    model: Model,
    a: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scales: bool = True,
    wide: bool = True,
    bias: Tensor | None = None,
    joined: bool = False,
    by_head: bool = False,
    cached: bool | None = None,
) -> Tensor:
    """`eager_attention_forward`: scores, softmax, and the weights, which live until the layer returns.

    `joined`: queries and keys are copies that the class joined of parts, head by head, and values are no cached ones.
    `wide`: softmax in fp32 and its result cast back; else in the scores' dtype, or as autocast says, in fp32 and left so.
    """
    f = model.tape
    single = a.num_key_value_heads == 1 != a.num_attention_heads  # a view, which `matmul` copies later
    keys, values = (repeat_kv(f, x, a, copies=not single) for x in (k, v))
    grouped = a.num_attention_heads != a.num_key_value_heads
    copied = not single and (grouped or ((model.joins if cached is None else cached) and not joined))
    dtype = q.dtype
    moved = joined or by_head
    in_order = copied or (moved and not single)
    scores = product(model, q, keys, (*q.dims[:3], k.dims[2]), joined=(moved, in_order), spread=single, transposed=True)
    if scales:
        scores = ops.scale(f, scores)
    if a.softcap:
        scores = ops.scale(f, scores, "div")
        scores = ops.keeps_output(f, scores, "tanh")
        scores = ops.scale(f, scores)
    if bias is not None:
        scores = ops.add(f, scores, bias)
    if mask is not None:
        scores = ops.add(f, scores, mask)
    weights = ops.softmax(f, scores, "fp32" if wide or f.autocast else scores.dtype)
    if wide:
        weights = f.to(weights, dtype)
    del scores
    weights = ops.dropout(f, weights, dropout)
    model.layer_locals.append(weights)
    out = product(model, weights, values, (*q.dims[:3], v.dims[3]), joined=(True, copied), spread=single)
    return gathered(model, out)


def _at_most(dim: Dim, bound: int) -> bool:
    return number(dim) <= bound
