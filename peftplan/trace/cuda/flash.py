"""The flash-attn package's kernels without values, for models with `flash_attention_2`, whether it is installed or not.

Letters: b batch, s queries, h query heads, d head size, n tokens of an unpadded batch. Source: flash-attn 2.8.3 `flash_api.cpp`
(`mha_fwd`, `mha_bwd`, `mha_varlen_fwd`, `mha_varlen_bwd`), `flash_attn_interface.py`, `bert_padding.py`; transformers
`modeling_flash_attention_utils.py`. A padded batch counts all its tokens: how many are padding lies in the data, and each takes
less. Left out: split accumulators of batches too small to fill the card, the deterministic backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from peftplan.dtypes import parse_dtype
from peftplan.errors import RefusedError
from peftplan.job.requirements import check_flash_dtypes
from peftplan.tape.split_keys import rounded_head
from peftplan.units import ceil_div

HALF = (torch.float16, torch.bfloat16)
MAX_HEAD = 256
HEAD_MULTIPLE = 8
"""Heads are padded to it."""
QUERY_BLOCK = 128
"""Queries in fp32 accumulators are rounded up to it; an unpadded batch gets as many more per sequence."""


def pad_last(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """The tensor with its last dim padded, a copy, or itself where it fits."""
    missing = -tensor.shape[-1] % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def backward_buffers(like: torch.Tensor, *, rows: tuple[int, ...], lse: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """What every backward takes beside the gradients: a delta per query, and dQ in fp32. `rows` × heads × rounded head."""
    heads, head = like.shape[-2:]
    delta = like.new_empty(lse, dtype=torch.float32)
    return delta, like.new_empty(*rows, heads, rounded_head(head), dtype=torch.float32)


def expanded_gradients(q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """With grouped queries dK and dV are made for every query head, then summed."""
    if q.shape[-2] == k.shape[-2]:
        return []
    return [k.new_empty(*k.shape[:-2], *q.shape[-2:]) for _ in "kv"]


class Dense(torch.autograd.Function):
    """`FlashAttnFunc`: tensors of [b, s, h, d]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        head = q.shape[-1]
        q, k, v = (pad_last(t, HEAD_MULTIPLE) for t in (q, k, v))
        out = torch.empty_like(q)
        b, s, h, _ = q.shape
        lse = q.new_empty(b, h, s, dtype=torch.float32)
        rng_state = q.new_empty(2, dtype=torch.int64)
        ctx.save_for_backward(q, k, v, out, lse, rng_state)
        return out[..., :head]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, *_saved = ctx.saved_tensors  # held until the kernel returns
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        head = grads[0].shape[-1]
        grad = pad_last(grads[0], HEAD_MULTIPLE)
        b, s, h, _ = q.shape
        rows = ceil_div(s, QUERY_BLOCK) * QUERY_BLOCK
        temporaries = backward_buffers(q, rows=(b, rows), lse=(b, h, rows)), expanded_gradients(q, k)
        del grad, temporaries
        return dq[..., :head], dk[..., :head], dv[..., :head]


class Unpadded(torch.autograd.Function):
    """`FlashAttnVarlenFunc`: tensors of [n, h, d]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
    ) -> torch.Tensor:
        head = q.shape[-1]
        q, k, v = (pad_last(t, HEAD_MULTIPLE) for t in (q, k, v))
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        rng_state = q.new_empty(2, dtype=torch.int64)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, rng_state)
        return out[..., :head]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, _out, _lse, cu_seqlens_q, *_saved = ctx.saved_tensors  # held until the kernel returns
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        head = grads[0].shape[-1]
        grad = pad_last(grads[0], HEAD_MULTIPLE)
        rows = q.shape[0] + QUERY_BLOCK * (cu_seqlens_q.shape[0] - 1)
        temporaries = backward_buffers(q, rows=(rows,), lse=(q.shape[1], rows)), expanded_gradients(q, k)
        del grad, temporaries
        return dq[..., :head], dk[..., :head], dv[..., :head], None, None


class Picked(torch.autograd.Function):
    """`tensor[indices]` along the first axis."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.shape = tensor.shape
        return tensor.new_empty(indices.shape[0], *tensor.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].new_zeros(ctx.shape), None


class Padded(torch.autograd.Function):
    """`IndexPutFirstAxis`: rows back to their places among zeros."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, indices: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(indices)
        return values.new_zeros(rows, *values.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return grads[0].new_empty(indices.shape[0], *grads[0].shape[1:]), None, None


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    """`flash_attn.flash_attn_func`: dropout keeps the random state that is kept anyway."""
    _check(q, k, v)
    out: torch.Tensor = Dense.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    """`flash_attn.flash_attn_varlen_func`."""
    _check(q, k, v)
    out: torch.Tensor = Unpadded.apply(q, k, v, cu_seqlens_q, cu_seqlens_k)  # type: ignore[no-untyped-call]
    return out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """What the kernels refuse (flash_api.cpp, `mha_fwd`)."""
    if q.dtype not in HALF:
        raise RefusedError(
            f"attn_implementation: flash_attention_2 takes fp16 and bf16, not {q.dtype}; accepted: sdpa, or autocast"
        )
    check_flash_dtypes(*(parse_dtype(each.dtype) for each in (q, k, v)))
    if q.shape[-1] > MAX_HEAD:
        raise RefusedError(
            f"attn_implementation: flash_attention_2 takes heads of up to {MAX_HEAD}, not {q.shape[-1]}; accepted: sdpa"
        )


def index_first_axis(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`_index_first_axis` of transformers: batch and sequence become one axis, by a copy where q is a transposed view."""
    out: torch.Tensor = Picked.apply(tensor.reshape(-1, *tensor.shape[2:]), indices)  # type: ignore[no-untyped-call]
    return out


def unpad_data(attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """`_get_unpad_data` of a mask whose tokens all count."""
    lengths = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = attention_mask.new_empty(attention_mask.numel(), dtype=torch.int64)
    cu_seqlens = torch.nn.functional.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
    return indices, cu_seqlens, attention_mask.shape[-1]


def unpad_input(states: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """`unpad_input` of flash-attn's `bert_padding.py`."""
    indices, cu_seqlens, longest = unpad_data(attention_mask)
    return index_first_axis(states, indices), indices, cu_seqlens, longest


def pad_input(states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """`pad_input` of flash-attn's `bert_padding.py`."""
    out: torch.Tensor = Padded.apply(states, indices, batch * seqlen)  # type: ignore[no-untyped-call]
    return out.view(batch, seqlen, *states.shape[1:])


def is_packed(position_ids: torch.Tensor | None, batch_size: int) -> bool:
    """`_is_packed_sequence` of a batch that is not packed: it compares positions with a range, in every layer."""
    if position_ids is not None and batch_size == 1 and position_ids.shape[-1] != 1:
        steps = torch.arange(position_ids.shape[1], device=position_ids.device) + position_ids.min()
        (steps - position_ids).abs().sum()
    return False


LOADED = (
    "_loaded_implementation", "_flash_fn", "_flash_with_kvcache_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn",
    "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn",
)  # fmt: skip
"""What `lazy_import_flash_attention` sets once (transformers, modeling_flash_attention_utils.py)."""


@contextmanager
def flash_attn_installed() -> Iterator[None]:
    """Let transformers find these kernels as the flash-attn package, and forget them afterwards."""
    from transformers import modeling_flash_attention_utils as utils

    with_cache = (None,) if hasattr(utils, LOADED[2]) else ()  # older releases have no kernel for caches
    functions = (flash_attn_func, flash_attn_varlen_func, *with_cache, pad_input, unpad_input)
    with ExitStack() as stack:
        for name in LOADED:
            if hasattr(utils, name):
                stack.enter_context(patch.object(utils, name, None))
        stack.enter_context(patch.object(utils, "_lazy_imports", lambda *args, **kwargs: functions))
        stack.enter_context(patch.object(utils, "_get_unpad_data", unpad_data))
        stack.enter_context(patch.object(utils, "_index_first_axis", index_first_axis))
        stack.enter_context(patch.object(utils, "_is_packed_sequence", is_packed))
        yield
