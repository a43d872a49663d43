"""The fused kernels of torch's attention: what FlashAttention-2 and the memory-efficient kernel allocate and save on CUDA.

Letters: b batch, a query heads, g key/value heads, s queries, k keys, d head size; queries, keys and values are (b, heads, s, d).
Sources: torch, aten/src/ATen/native/transformers/cuda/attention.cu and attention_backward.cu, flash_attn/flash_api.cpp,
mem_eff_attention/kernel_backward.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from peftplan.ledger import Dim
from peftplan.tape import ops
from peftplan.tape.efficient_backward import TILE_HEADER, Workspace
from peftplan.tape.shaping import sliced
from peftplan.tape.split_keys import SplitKeys, rounded_head
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor
from peftplan.units import ceil_div

FLASH_BLOCK = 128
"""Queries of flash's fp32 accumulators are rounded up to it (`seqlen_q_rounded`)."""
HEAD_MULTIPLE = 8
"""Heads are padded to it for flash; the memory-efficient kernel takes no other (in fp32 half of it)."""
MASK_MULTIPLE = 8
"""Rows of a mask are padded to it (`pad_bias`)."""
MASK_GRADIENT_MULTIPLE = 16
"""Rows of a mask's gradient are padded to it (`_efficient_attention_backward`)."""
LSE_MULTIPLE = 32
"""Queries of the memory-efficient logsumexp are padded to it (`kAlignLSE`)."""
EFFICIENT_BLOCK = 64
RF_HEAD = 128
"""Largest head, of queries or values, whose output the memory-efficient forward keeps in registers; above, it accumulates in an
fp32 buffer (`kMaxK`, `kSingleValueIteration`)."""


def padded(dim: Dim, multiple: int) -> Dim:
    """A dim up to a multiple: a number, or a named size such as `s%128`."""
    return ceil_div(dim, multiple) * multiple if isinstance(dim, int) else f"{dim}%{multiple}"


def blocks(dim: Dim, size: int) -> Dim:
    """How many blocks a dim takes: a number, or a named size such as `s/64`."""
    return ceil_div(dim, size) if isinstance(dim, int) else f"{dim}/{size}"


def flash(f: Tape, q: Tensor, k: Tensor, v: Tensor, *, copies_output: bool = False, splits: bool = False) -> Tensor:
    """FlashAttention-2: keeps q, k, v, its output and an fp32 logsumexp; dims (b, a, s, d), (b, g, k, d).

    `copies_output`: backward copies the output, as torch's does where it lies head by head like the queries
    (attention_backward.cu), and flash-attn's never does. `splits`: keys may be split (`tape.split_keys`).
    """
    b, a, s, d = q.dims
    if number(d) % HEAD_MULTIPLE:
        q, k, v = (padded_head(f, x, padded(d, HEAD_MULTIPLE)) for x in (q, k, v))
    node = f.record(_flash_backward, (q, k, v), q.detach(), k.detach(), v.detach(), copies_output)
    out = f.new((b, s, a, q.dims[3]), q.dtype, "flash attention", node)
    logsumexp = f.new((b, a, s), "fp32", "logsumexp")
    if splits:
        parts = SplitKeys((b, a, s), k.dims[2], number(q.dims[3]), f.card)
        of_parts = [f.new((parts, b, a, s, *head), "fp32", "parts") for head in ((), (rounded_head(number(q.dims[3])),))]
        while of_parts:
            of_parts.pop(0)
    f.keep(node, out.detach(), logsumexp, f.new((2,), "int64", "rng state"), f.new((), "int64", "unused"))
    return out.view((b, a, s, d))


def padded_head(f: Tape, x: Tensor, head: Dim) -> Tensor:
    """`pad` to this head size: keeps nothing."""
    return f.new((*x.dims[:3], head), x.dtype, "pad", f.record(_pad_backward, (x,), x.dims))


def _pad_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "slice")


def _flash_backward(f: Tape, node: Node, saved: Sequence[Tensor], g: Tensor) -> Gradients:
    return flash_gradients(f, saved[0], saved[1], copies_output=bool(saved[3]))


def flash_gradients(f: Tape, q: Tensor, k: Tensor, *, copies_output: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; those of keys and values are expanded to all heads first."""
    b, a, s, d = q.dims
    copied = f.new((b, s, a, d), q.dtype, "out, copied") if copies_output else None
    keys = (b, k.dims[2], k.dims[1], d)
    rounded = padded(s, FLASH_BLOCK)
    dq = f.new((b, s, a, d), q.dtype, "dq")
    dk, dv = f.new(keys, q.dtype, "dk"), f.new(keys, q.dtype, "dv")
    delta = f.new((b, a, rounded), "fp32", "delta")
    accumulator = f.new((b, rounded, a, rounded_head(number(d))), "fp32", "dq accumulator")
    if k.dims[1] != a:
        expanded = [f.new((b, k.dims[2], a, d), q.dtype, "expanded dk, dv") for _ in "kv"]
        del expanded
    del delta, accumulator, copied
    return dq, dk, dv


Efficient: TypeAlias = tuple[Tensor, Tensor, Tensor, bool, Tensor, Tensor, Tensor | None]
"""What the memory-efficient kernel saves: q, k, v, its output, the logsumexp and the mask; and whether the gradient of a mask is
a slice of longer rows, to which autograd never adds in place (`is_non_overlapping_and_dense`)."""


def efficient(f: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, keys: int) -> Tensor:
    """The memory-efficient kernel: keeps q, k, v, its output, an fp32 logsumexp, and its own copy of a boolean mask.

    `keys`: how many there are. If they are no multiple of 8, the rows of a mask are padded, in another copy.
    """
    b, a, s, _ = q.dims
    if mask is not None and mask.dtype != q.dtype:
        mask = f.new((b, *mask.dims[1:]), q.dtype, "mask")
    if mask is not None and keys % MASK_MULTIPLE:
        dims = (*mask.dims[:3], padded(mask.dims[3], MASK_MULTIPLE))
        rows = f.new(dims, q.dtype, "mask, padded", f.record(_pad_backward, (mask,), mask.dims))
        mask = sliced(f, rows, mask.dims)
        del rows
    whole = (b, a, s, k.dims[2])
    expands = mask is not None and mask.dims != whole
    if mask is not None and expands:
        mask = ops.expanded(f, mask, whole)
    is_view = bool(keys % MASK_GRADIENT_MULTIPLE) or not expands  # `sum_to` views a gradient that has the mask's dims
    node = f.record(_efficient_backward, (q, k, v, mask), q.detach(), k.detach(), v.detach(), is_view)
    out, lse = efficient_output(f, q, v, node)
    f.keep(node, out.detach(), lse, None if mask is None else mask.detach())
    return out.view((b, a, s, v.dims[3]))


def efficient_output(f: Tape, q: Tensor, v: Tensor, node: Node | None = None) -> tuple[Tensor, Tensor]:
    """The kernel's output, (b, s, a, d of the values), and its fp32 logsumexp."""
    b, a, s, d = (*q.dims[:3], v.dims[3])
    out = f.new((b, s, a, d), q.dtype, "memory-efficient attention", node)
    lse = f.new((b, a, padded(s, LSE_MULTIPLE)), "fp32", "logsumexp")
    if max(number(q.dims[3]), number(d)) > RF_HEAD and q.dtype != "fp32":
        accumulator = f.new(out.dims, "fp32", "accumulator")
        del accumulator
    return out, lse


def _efficient_backward(f: Tape, node: Node, saved: Efficient, g: Tensor) -> Gradients:
    """A gradient of the mask comes for each sample and head."""
    q, k, v, is_view = saved[:4]
    dq, dk, dv, of_mask = efficient_gradients(f, q, k, v, g, masked=node.edges[3] is not None, is_view=is_view)
    return dq, dk, dv, None if of_mask is None else of_mask.view((*q.dims[:3], k.dims[2]))


def efficient_gradients(
    f: Tape, q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, masked: bool = False, is_view: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of queries, keys and values, and of the rows of a mask."""
    b, a, s, d = q.dims
    dq = f.new((b, s, a, d), q.dtype, "dq")
    dk = f.new((b, k.dims[2], a, d), q.dtype, "dk")
    dv = f.new((b, v.dims[2], a, v.dims[3]), q.dtype, "dv")
    of_mask = f.new((b, a, s, padded(k.dims[2], MASK_GRADIENT_MULTIPLE)), q.dtype, "dmask") if masked else None
    if of_mask is not None and is_view:
        f.view_of(of_mask)
    if q.dtype == "fp32":
        product = f.new(g.dims, "fp32", "mul")
        delta = f.new((b, a, s), "fp32", "delta")
        del product
    else:
        delta = f.new((b, a, s), "fp32", "delta")
        if max(number(d), number(v.dims[3])) > RF_HEAD:
            workspace = f.new((b, a, Workspace(q.dims, v.dims[2:])), "fp32", "accumulators")
        else:
            tiles = (blocks(s, EFFICIENT_BLOCK), blocks(d, EFFICIENT_BLOCK))
            workspace = f.new((b, a, *tiles, EFFICIENT_BLOCK**2 + TILE_HEADER), "fp32", "dq accumulator")
        del workspace
    del delta, g
    return dq, dk, dv, of_mask


def number(dim: Dim) -> int:
    """A dim that is no named size."""
    assert isinstance(dim, int)
    return dim
