"""Attention: what eager attention and torch's `scaled_dot_product_attention` allocate and save on CUDA.

Letters: b batch, a query heads, g key/value heads, s queries, k keys, d head size. Queries, keys and values are (b, heads, s, d)
views of projections that lie (b, s, heads, d), as transformers makes them.
Sources: torch, aten/src/ATen/native/transformers/attention.cpp (`_scaled_dot_product_attention_math`), cuda/sdp_utils.cpp
(the choice); transformers, integrations/sdpa_attention.py, models/llama/modeling_llama.py (`eager_attention_forward`). The fused
kernels are in `fused_attention`, masks in `masks`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from peftplan.arch.modules import Attention
from peftplan.errors import NeedsTraceError
from peftplan.job.requirements import check_flash_dtypes
from peftplan.ledger import Dim
from peftplan.memory.fused_attention import HEAD_MULTIPLE, efficient, flash, number, padded_head
from peftplan.tape import ops, products
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor

if TYPE_CHECKING:
    from peftplan.memory.model import Model

FLASH_CAPABILITY = (8, 0)
"""FlashAttention needs sm80; older cards run the memory-efficient kernel, which has no grouped queries."""
MAX_FLASH_HEAD = 256
HALF = ("bf16", "fp16")


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
    grouped = a.num_attention_heads != a.num_key_value_heads
    if model.running.attention == "eager":
        if not by_head:
            q, k, v = by_heads(f, q, k, v, rotated=rotated, moved=moved)
        return eager(model, a, q, k, v, mask, dropout=dropout, wide=wide, bias=bias, by_head=by_head, cached=cached)
    gqa = grouped and mask is None and q.dims[3] == v.dims[3] and _at_most(q.dims[3], MAX_FLASH_HEAD)
    repeats = model.running.attention == "sdpa" and grouped and (model.running.repeats_kv or not gqa)
    kernel = _kernel(model, q, v, mask, dtype=f.autocast or q.dtype, grouped=q.dims[1] != k.dims[1] and not repeats)
    if kernel == "math" or repeats:
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
    if model.running.attention == "flash_attention_2":
        q, k, v = _of_one_dtype(f, q, k, v)
    elif f.autocast:
        q, k, v = f.cast_all(f.autocast, q, k, v)
    if kernel == "flash":
        out = flash(f, q, k, v, copies_output=by_head and model.running.attention == "sdpa")
        del q, k, v  # autocast's copies
        if head != out.dims[3]:
            out = sliced(f, out, (*out.dims[:3], head))
        if model.running.attention == "flash_attention_2":
            del _arguments  # the layer copies the result, once `flash_attention_forward` has returned
        if by_head:
            out = ops.copied(f, out, "clone")
    elif kernel == "efficient":
        out = efficient(f, q, k, v, mask, keys=model.length(k.dims[2]))
    else:
        autocast, f.autocast = f.autocast, None  # the wrapper that cast the inputs turns it off
        try:
            out = math(model, a, q, k, v, mask, dropout=dropout, by_head=by_head, cached=cached)
        finally:  # a recomputation may stop inside
            f.autocast = autocast
        del q, k, v  # autocast's copies
        out = ops.copied(f, out, "clone")
    b, heads, s, d = out.dims
    return out.view((b, s, _product(heads, d)))


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
        if running.padding or dtype not in HALF:
            raise NeedsTraceError("flash_attention_2 with padding or fp32 inputs")
        return "flash"
    if mask is None and dtype in HALF and running.flash and _at_most(head, MAX_FLASH_HEAD) and head == v.dims[3]:
        return "flash"
    aligned = not number(head) % (HEAD_MULTIPLE if dtype in HALF else HEAD_MULTIPLE // 2)
    known = dtype in ("fp16", "fp32") or (dtype == "bf16" and running.flash)
    return "efficient" if known and aligned and not grouped else "math"


def by_heads(f: Tape, q: Tensor, k: Tensor, v: Tensor, *, rotated: bool, moved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Views whose gradients come back head by head, so that the projections' gradients need a copy."""
    q = q if rotated else ops.heads(f, q, q.dims, clones=True)
    k = k if rotated or moved else ops.heads(f, k, k.dims, clones=True)
    return q, k, v if moved else ops.heads(f, v, v.dims, clones=True)


def viewed(model: Model, x: Tensor) -> Tensor:
    """A projection as heads whose gradient needs no copy: it comes back as a view, to which autograd adds nothing in place.

    DoRA alone sends two gradients to a projection; elsewhere the view needs no node.
    """
    return ops.reshaped(model.tape, x) if getattr(model.running.config, "use_dora", False) else x


def repeat_kv(f: Tape, x: Tensor, a: Attention, *, copies: bool = True) -> Tensor:
    """`repeat_kv`: a copy with every head repeated; its gradient is summed over the repetitions.

    A single head is a view, which `matmul` copies for more than one sequence.
    """
    if a.num_attention_heads == a.num_key_value_heads:
        return x
    b, _, s, d = x.dims
    dims, node = (b, a.num_attention_heads, s, d), f.record(_repeat_backward, (x,), x.dims)
    return f.new(dims, x.dtype, "repeat_kv", node) if copies else Tensor(x.storage, dims, x.dtype, node)


def _repeat_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "sum")


def spread(f: Tape, x: Tensor, heads: Dim) -> Tensor:
    """One head that serves many: `matmul` copies it for each; its gradient is summed."""
    b, _, s, d = x.dims
    return f.new((b, heads, s, d), x.dtype, "clone", f.record(_repeat_backward, (x,), x.dims))


def for_all(model: Model, x: Tensor, heads: Dim) -> Tensor:
    """What `matmul` makes of one head for many: a copy for each, of one sequence a view."""
    if model.running.batch_size > 1:
        return spread(model.tape, x, heads)
    return ops.expanded(model.tape, x, (x.dims[0], heads, *x.dims[2:]))


def batched(model: Model, x: Tensor) -> Tensor:
    """What `matmul` makes of a (b, heads, …) view that lies (b, s, heads, d): a copy, unless the batch is one."""
    return ops.copied(model.tape, x, "clone") if model.running.batch_size > 1 else x


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


def product(
    model: Model,
    a: Tensor,
    b: Tensor,
    dims: Dims,
    *,
    joined: tuple[bool, bool],
    spread: bool = False,
    transposed: bool = False,
) -> Tensor:
    """`matmul` of activations, which copies what does not lie head by head (`joined`: a, b do) once autocast has cast it.

    `spread`: b is a view of one head for all, of which a cast makes a tensor that lies head by head. `transposed`: as in
    `products.matmul`.
    """
    f = model.tape
    in_order = joined[1] or (spread and f.autocast not in (None, b.dtype))
    if f.autocast:
        a, b = f.cast_all(f.autocast, a, b)
    copies = a if joined[0] else batched(model, a), b if in_order else batched(model, b)
    return products.matmul(f, *copies, dims, transposed=transposed)


def _scores(f: Tape, q: Tensor, k: Tensor) -> Tensor:
    return products.matmul(f, q, k, (*q.dims[:3], k.dims[2]), transposed=True)


def gathered(model: Model, out: Tensor) -> Tensor:
    """`transpose(1, 2).contiguous()`; the gradient comes back as a view, which `matmul` copies for more than one sequence."""
    f = model.tape
    b, heads, s, d = out.dims
    clones = model.running.batch_size > 1
    node = f.record(_gathered_backward, (out,), out.dims, clones)
    return f.new((b, s, heads, d), out.dtype, "clone", node).view((b, s, _product(heads, d)))


def _gathered_backward(f: Tape, node: Node, saved: tuple[Dims, bool], g: Tensor) -> Tensor:
    dims, clones = saved
    return f.new(dims, g.dtype, "clone") if clones else g


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
    wide = "fp32" if dtype in HALF else dtype
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


def _at_most(dim: Dim, bound: int) -> bool:
    return number(dim) <= bound


def _product(heads: Dim, head: Dim) -> int:
    return number(heads) * number(head)
