"""The math kernel of `scaled_dot_product_attention`, operation by operation.

torch's own composite runs inside C++, where a CPU drops out by a mask of the scores' dtype and CUDA keeps a boolean one
(`native_dropout`), and where a mode lets the mask be added to the scores out of place (`areAnyTensorSubclassLike`). Source:
torch aten/src/ATen/native/transformers/attention.cpp (`_scaled_dot_product_attention_math`, `convert_boolean_attn_mask`,
`pre_process_group_query_attention_input`). Every name lives until the function returns, as there.
"""

from __future__ import annotations

import math

import torch

HALF = (torch.float16, torch.bfloat16)
HEADS = -3


def math_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Attention over all scores, in fp32 for 16-bit inputs; the weights in the inputs' dtype are made first and discarded."""
    dtype = query.dtype
    q, k, v = (x.float() if dtype in HALF else x for x in (query, key, value))
    root = math.sqrt(abs(scale if scale is not None else 1 / math.sqrt(query.shape[-1])))
    scaled = q * root
    mask = _additive(attn_mask, is_causal, scaled, k)
    keys, values = _by_query_head(scaled, k, enable_gqa), _by_query_head(scaled, v, enable_gqa)
    weights = scaled @ (keys.transpose(-2, -1) * root)
    if mask is not None:
        weights += mask
    weights = torch.ops.aten._safe_softmax(weights, -1)
    if dropout_p:
        weights = torch.ops.aten.native_dropout(weights, dropout_p, True)[0]
    low = weights.to(dtype)
    out: torch.Tensor = (weights @ values).to(dtype)
    del low
    return out


def _additive(mask: torch.Tensor | None, is_causal: bool, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores: minus infinity where a boolean mask is false."""
    if is_causal:
        mask = queries.new_ones((queries.shape[-2], keys.shape[-2]), dtype=torch.bool).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=queries.dtype).masked_fill_(mask.logical_not(), -math.inf)


def _by_query_head(queries: torch.Tensor, x: torch.Tensor, enable_gqa: bool) -> torch.Tensor:
    """Keys or values, each head repeated for its group of query heads."""
    times = queries.shape[HEADS] // x.shape[HEADS] if enable_gqa else 1
    return x.repeat_interleave(times, HEADS) if times > 1 else x
