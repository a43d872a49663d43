"""CUDA's attention kernels: functions without values that allocate and save what the real kernels do.

Letters: b batch, h query heads, g key/value heads, s queries, k keys, d head size.
Source: torch aten/src/ATen/native/transformers/cuda/attention.cu, attention_backward.cu, flash_attn/flash_api.cpp (whose
buffers are those of the flash-attn package, `flash.py`), mem_eff_attention/kernel_backward.h, and the choice between them,
cuda/sdp_utils.cpp; what is returned and kept also in torch/_meta_registrations.py. Left out: cuDNN's kernel, nested tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from peftplan.hardware.processors import A100, Processors
from peftplan.tape import efficient_backward, split_keys
from peftplan.tape.split_keys import rounded_head
from peftplan.trace.cuda.flash import backward_buffers, expanded_gradients, pad_last
from peftplan.trace.cuda.math_attention import math_kernel
from peftplan.units import ceil_div

FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_CAPABILITY = (8, 0)
"""Flash attention needs sm80; on older cards the memory-efficient kernel runs, which has no grouped queries."""
MAX_FLASH_HEAD = 256
HEAD_MULTIPLE = 8
"""Head sizes are padded to it (`pad_last_dim<8>`)."""
LSE_ALIGNMENT = 32
"""`kAlignLSE` of the memory-efficient kernel: queries in its logsumexp are padded to it."""
MASK_ALIGNMENT = 8
"""`pad_bias`: rows of a mask are padded to it for the memory-efficient kernel."""
MASK_GRADIENT_ALIGNMENT = 16
"""Rows of a mask's gradient are padded to it (`_efficient_attention_backward`)."""
FLASH_BLOCK = 128
"""Queries per block in flash's fp32 accumulators (`seqlen_q_rounded`)."""
NO_WIDE_BACKWARD = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
"""Cards whose flash backward lacks heads above 192 and up to 224
(`check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120`)."""
WIDE_HEADS = range(193, 225)
RF_HEAD = 128
"""Largest head whose output the memory-efficient forward keeps in registers; above, it accumulates in an fp32 buffer."""
EFFICIENT_BLOCK = 64
"""Queries and head elements per tile of the memory-efficient backward's fp32 accumulator of dQ."""
TILE_HEADER = 4
"""Numbers before each tile: a lock, a counter, and padding to 128 bits (`GradQTempStorage`, kernel_backward.h)."""

Capability = tuple[int, int]


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    capability: Capability,
    card: Processors = A100,
) -> torch.Tensor:
    """`scaled_dot_product_attention` as CUDA runs it on a card of this compute capability."""
    kernel = choose(query, key, value, attn_mask, enable_gqa=enable_gqa, capability=capability)
    if kernel == "math":
        return math_kernel(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if kernel == "flash":
        head = query.shape[-1]
        padded = [pad_last(t, HEAD_MULTIPLE) for t in (query, key, value)]
        flash: torch.Tensor = Flash.apply(*padded, None if dropout_p else card)  # type: ignore[no-untyped-call]
        return flash[..., :head]
    efficient: torch.Tensor = Efficient.apply(query, key, value, prepared_mask(attn_mask, query, key))  # type: ignore[no-untyped-call]
    return efficient


def choose(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    *,
    enable_gqa: bool,
    capability: Capability,
) -> str:
    """The kernel that torch chooses: flash, else the memory-efficient one, else math (`select_sdp_backend`).

    Fused kernels broadcast no heads, and flash alone groups them (`check_batch_size_and_num_heads_dense`).
    """
    head = query.shape[-1]
    same_head = head == value.shape[-1]
    if query.dim() != len("bhsd"):
        return "math"
    if (
        attn_mask is None
        and query.dtype in FLASH_DTYPES
        and capability >= FLASH_CAPABILITY
        and head <= MAX_FLASH_HEAD
        and same_head
        and (enable_gqa or query.shape[1] == key.shape[1])
        and not (query.requires_grad and capability in NO_WIDE_BACKWARD and head in WIDE_HEADS)
    ):
        return "flash"
    grouped = query.shape[1] != key.shape[1]
    half = query.dtype == torch.float16 or (query.dtype == torch.bfloat16 and capability >= FLASH_CAPABILITY)
    aligned = head % HEAD_MULTIPLE == 0 if query.dtype in FLASH_DTYPES else head % (HEAD_MULTIPLE // 2) == 0
    if (half or query.dtype == torch.float32) and not grouped and aligned:
        return "efficient"
    return "math"


def prepared_mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """A boolean mask becomes one of the query's dtype (`convert_boolean_attn_mask`), with its rows padded (`pad_bias`)."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = mask.to(query.dtype)
    mask = pad_last(mask, MASK_ALIGNMENT)
    return mask[..., : key.shape[2]].expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


class Flash(torch.autograd.Function):
    """FlashAttention-2: keeps q, k, v, the output, an fp32 logsumexp per query and head, and a random state of two tensors."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, card: Processors | None) -> torch.Tensor:
        b, h, s, d = q.shape
        out = torch.empty_like(q)
        lse = q.new_empty(b, h, s, dtype=torch.float32)
        if card is not None and (parts := split_keys.parts_of(b * h, s, k.shape[2], d, card)):
            of_parts = [q.new_empty(parts, b, h, s, *head, dtype=torch.float32) for head in ((), (rounded_head(d),))]
            while of_parts:
                of_parts.pop(0)
        rng_state, unused = q.new_empty(2, dtype=torch.int64), q.new_empty((), dtype=torch.int64)
        ctx.save_for_backward(q, k, v, out, lse, rng_state, unused)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        saved = ctx.saved_tensors
        q, k, v, out = (t.transpose(1, 2) for t in saved[:4])
        copies = grads[0].transpose(1, 2).contiguous(), out.contiguous()
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        b, s, h, _ = q.shape
        rows = ceil_div(s, FLASH_BLOCK) * FLASH_BLOCK
        temporaries = backward_buffers(q, rows=(b, rows), lse=(b, h, rows)), expanded_gradients(q, k)
        del copies, temporaries, saved
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None


class Efficient(torch.autograd.Function):
    """The memory-efficient kernel: keeps q, k, v, the mask, the output and a padded fp32 logsumexp."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        b, h, s, _ = q.shape
        d = v.shape[-1]
        out = q.new_empty(b, s, h, d).transpose(1, 2)
        lse = q.new_empty(b, h, ceil_div(s, LSE_ALIGNMENT) * LSE_ALIGNMENT, dtype=torch.float32)
        if max(q.shape[-1], d) > RF_HEAD and q.dtype != torch.float32:
            accumulator = q.new_empty(b, s, h, d, dtype=torch.float32)
            del accumulator
        ctx.save_for_backward(q, k, v, out, lse, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, out, lse, mask = ctx.saved_tensors
        b, h, s, d = q.shape
        grad = grads[0].transpose(1, 2).contiguous()
        dq, dk, dv = (t.new_empty(b, t.shape[2], h, t.shape[3]) for t in (q, k, v))
        of_mask = None
        if ctx.needs_input_grad[3]:
            keys = k.shape[2]
            of_mask = q.new_empty(b, h, s, ceil_div(keys, MASK_GRADIENT_ALIGNMENT) * MASK_GRADIENT_ALIGNMENT)[..., :keys]
        if q.dtype == torch.float32:
            delta = (grad * out.transpose(1, 2)).sum(-1).transpose(1, 2).contiguous()
        else:
            delta = q.new_empty(b, h, s, dtype=torch.float32)
            if max(d, v.shape[3]) > RF_HEAD:
                elements = efficient_backward.workspace(b * h, s, k.shape[2], d, v.shape[3])
            else:
                tiles = ceil_div(s, EFFICIENT_BLOCK) * ceil_div(d, EFFICIENT_BLOCK)
                elements = tiles * (TILE_HEADER + EFFICIENT_BLOCK**2)
            workspace = q.new_empty(b * h * elements, dtype=torch.float32)
            del delta, workspace
        del grad, lse, mask
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), of_mask
