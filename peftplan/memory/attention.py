"""Attention kernels: what eager attention and torch's `scaled_dot_product_attention` make and keep on CUDA.

Letters: b batch, a query heads, g key/value heads, q queries, k keys, d head size, e head size of the values.
Sources: torch 2.13, aten/src/ATen/native/transformers/cuda (sdp_utils.cpp chooses; attention.cu, attention_backward.cu),
flash_attn/flash_api.cpp, mem_eff_attention/kernel_backward.h; transformers 5.24, integrations/sdpa_attention.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftplan.arch.modules import Attention
from peftplan.memory.ledger import Dim
from peftplan.memory.tape import Node, Tape, Tensor
from peftplan.units import ceil_div

if TYPE_CHECKING:
    from peftplan.memory.model import Model

FLASH_CAPABILITY = (8, 0)
"""FlashAttention needs sm80; older cards run the memory-efficient kernel, which has no grouped queries."""
MAX_FLASH_HEAD = 256
FLASH_HEAD_STEP = 32
HEAD_MULTIPLE = 8


def padded(dim: Dim, multiple: int) -> Dim:
    """A dim up to a multiple: a number, or a named size such as `s%128`."""
    return ceil_div(dim, multiple) * multiple if isinstance(dim, int) else f"{dim}%{multiple}"


def flash(f: Tape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2: keeps q, k, v, its output and an fp32 logsumexp; dims (b, a, q, d), (b, g, k, d)."""
    b, a, s, d = q.dims
    if isinstance(d, int) and d % HEAD_MULTIPLE:
        q, k, v = (_padded_head(f, x) for x in (q, k, v))
    node = f.record(_flash_backward, (q, k, v), q.detach(), k.detach(), v.detach())
    out = f.new((b, s, a, q.dims[3]), q.dtype, "flash attention", node)
    f.keep(node, out.detach(), f.new((b, a, s), "fp32", "logsumexp"), f.new((2,), "int64", "rng state"))
    return out.view((b, a, s, d))


def _padded_head(f: Tape, x: Tensor) -> Tensor:
    dims = (*x.dims[:3], padded(x.dims[3], HEAD_MULTIPLE))
    return f.new(dims, x.dtype, "pad", f.record(_pad_backward, (x,), x.dims))


def _pad_backward(f: Tape, node: Node, saved: Any, g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "slice")


def _flash_backward(f: Tape, node: Node, saved: Any, g: Tensor) -> Any:
    q, k = saved[:2]
    b, a, s, d = q.dims
    keys = (b, k.dims[2], k.dims[1], d)
    rounded = padded(s, 128)
    dq = f.new((b, s, a, d), q.dtype, "dq")
    dk, dv = f.new(keys, q.dtype, "dk"), f.new(keys, q.dtype, "dv")
    delta = f.new((b, a, rounded), "fp32", "delta")
    accumulator = f.new((b, rounded, a, padded(d, FLASH_HEAD_STEP)), "fp32", "dq accumulator")
    if k.dims[1] != a:
        expanded = [f.new((b, k.dims[2], a, d), q.dtype, "expanded dk, dv") for _ in "kv"]
        del expanded
    del delta, accumulator
    return dq, dk, dv


def attend(model: Model, a: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' attention function: sdpa with CUDA's choice of kernel, or eager; (b, a, q, d) in and out."""
    f = model.tape
    if f.autocast:
        q, k, v = f.cast(q, f.autocast), f.cast(k, f.autocast), f.cast(v, f.autocast)
    return flash(f, q, k, v)
