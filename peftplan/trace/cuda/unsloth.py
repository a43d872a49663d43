"""Unsloth's fused linear cross entropy: forward computes the gradient of the hidden states, tile by tile, from fp32 logits.

Letters: n scored tokens, h hidden size, v vocabulary. Source: unsloth_zoo 2026.10.9 `fused_losses/fused_linear.py`: `_ce_impl`,
`_tiled_forward`, `_tiled_layout`, `fused_linear_rows`, `_Buffers`; `_ce_backward`. Its tiles depend on the card: as on one of
over 24.5 GiB with 4 GiB or more of them free, without its environment variables. Left out: its other kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from peftplan.trace.cuda.attention import Capability
from peftplan.units import GIB, ceil_div

HALF = (torch.float16, torch.bfloat16)
SPLIT_COLUMNS = 16384
"""Vocabulary entries per partial softmax (`_SPLIT_COLS`)."""
FEW_SPLITS = 2
"""Up to so many parts of the vocabulary are one (`_tiled_vocab`)."""
MAX_ROWS = 4096
"""Tokens per chunk at most, and per tile of the pass for frozen heads (`_MAX_ROWS`, `_BWD_ROWS`)."""
FEWEST_LOGITS = 512 * 151936
"""A chunk holds about so many logits at least (`_MIN_LOGITS`), and 512 tokens."""
FEWEST_ROWS = 512
CHUNK_BYTES = 2 * GIB
FLASH_FROM_ROWS = 4096
"""From so many scored tokens on, a frozen head never sees a whole row of logits (`_flash_min_rows` of a large card)."""
STATISTICS, PARTIAL_STATISTICS = 7, 8
"""fp32 numbers per token and split of the vocabulary, chunked and tiled."""
COLUMN_MULTIPLE = 8
TENSOR_CORES_OF_BF16 = (8, 0)


class FusedLinear(torch.autograd.Function):
    """`fused_linear_cross_entropy` of a batch of which `scored` tokens have a label."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scored: int,
        capability: Capability,
    ) -> torch.Tensor:
        into_hidden, into_weight, into_bias = hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        scored_rows = targets.new_empty(scored)
        grad_hidden = torch.zeros_like(hidden) if into_hidden else hidden.new_empty(0)
        grad_weight = torch.zeros_like(weight) if into_weight else hidden.new_empty(0)
        grad_bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if into_bias else None
        full_bias = None if bias is None else weight.new_zeros(weight.shape[0], dtype=torch.float32)
        stored = weight.to(dtype)
        log_probs = hidden.new_empty(scored, dtype=torch.float32)
        modern = capability >= TENSOR_CORES_OF_BF16
        fp32 = dtype == torch.float16 or (dtype == torch.bfloat16 and modern)
        many = ceil_div(weight.shape[0], SPLIT_COLUMNS) > FEW_SPLITS
        with torch.autocast(device, enabled=False):
            if fp32 and modern and many and scored >= FLASH_FROM_ROWS and not (into_weight or into_bias):
                _tiled(hidden, stored, scored_rows, dtype)
            else:
                _chunked(hidden, stored, scored_rows, dtype, fp32, grad_hidden, grad_weight if into_weight else None, grad_bias)
        loss = (-log_probs.double()).sum().float()
        del full_bias, log_probs, stored
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.needs = into_hidden, into_weight, None if grad_bias is None or bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Each gradient scaled into a tensor of its own (`fused_linear_scale_rows`)."""
        grad_hidden, grad_weight = ctx.saved_tensors
        into_hidden, into_weight, bias_dtype = ctx.needs
        out_hidden = torch.empty_like(grad_hidden) if into_hidden else None
        out_weight = torch.empty_like(grad_weight) if into_weight else None
        out_bias = None if bias_dtype is None else grad_hidden.new_empty(grad_weight.shape[0], dtype=bias_dtype)
        return out_hidden, out_weight, out_bias, None, None, None


def _tiled(hidden: torch.Tensor, weight: torch.Tensor, scored_rows: torch.Tensor, dtype: torch.dtype) -> None:
    """`_tiled_forward` with a gradient: tiles of logits become probabilities in place; an fp32 accumulator of [rows, h]."""
    scored, (vocab, width) = scored_rows.shape[0], weight.shape
    columns = SPLIT_COLUMNS  # 256 MiB (`_BWD_TILE_BYTES`) hold no more of 4096 fp32 rows
    rows, splits = min(MAX_ROWS, scored), ceil_div(vocab, SPLIT_COLUMNS)
    buffer = hidden.new_empty(rows, columns, dtype=torch.float32)
    accumulator = hidden.new_empty(rows, width, dtype=torch.float32)
    maximum, logsumexp = (hidden.new_empty(count, dtype=torch.float32) for count in (rows, scored))
    for first in range(0, scored, rows):
        h = hidden.index_select(0, scored_rows[first : first + rows]).to(dtype)
        n = h.shape[0]
        partial = hidden.new_empty(PARTIAL_STATISTICS, splits, n, dtype=torch.float32)
        for start in range(0, vocab, columns):
            tile = weight[start : start + columns]
            torch.mm(h, tile.t(), out_dtype=torch.float32, out=buffer[:n, : tile.shape[0]])
            _into(accumulator[:n], buffer.view(dtype)[:n, : tile.shape[0]], tile)
    del maximum, logsumexp, partial


def _chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scored_rows: torch.Tensor,
    dtype: torch.dtype,
    fp32: bool,
    grad_hidden: torch.Tensor,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
) -> None:
    """The pass for trainable heads, few tokens and small vocabularies: one buffer of [rows, v] logits."""
    scored, (vocab, width) = scored_rows.shape[0], weight.shape
    itemsize = torch.float32.itemsize if fp32 else dtype.itemsize
    rows = chunk_rows(scored=scored, hidden_size=width, vocab_size=vocab, itemsize=itemsize)
    columns = ceil_div(vocab, COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    buffer = hidden.new_empty(rows, columns, dtype=torch.float32 if fp32 else dtype)
    for first in range(0, scored, rows):
        h = hidden.index_select(0, scored_rows[first : first + rows]).to(dtype)
        targets = scored_rows.index_select(0, scored_rows[first : first + rows])
        logits = buffer[: h.shape[0], :vocab]
        torch.mm(h, weight.t(), out=logits, **({"out_dtype": torch.float32} if fp32 else {}))
        splits = ceil_div(vocab, SPLIT_COLUMNS)
        statistics = hidden.new_empty(STATISTICS if splits > FEW_SPLITS else 0, splits, h.shape[0], dtype=torch.float32)
        del statistics, targets
        dz = (buffer.view(dtype) if fp32 else buffer)[: h.shape[0], :vocab]
        if grad_hidden.numel():
            product = torch.mm(dz, weight, **({"out_dtype": torch.float32} if dtype in HALF else {}))  # type: ignore[call-overload]
            grad_hidden.index_copy_(0, scored_rows[first : first + rows], product.to(grad_hidden.dtype))
        if grad_weight is not None:
            _into(grad_weight, dz.t(), h)
        if grad_bias is not None:
            grad_bias += dz.sum(0, dtype=torch.float32)


def _into(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`_addmm_fp32`."""
    if into.dtype == torch.float32 and a.dtype in HALF:
        torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
    elif into.dtype == a.dtype:
        into.addmm_(a, b)
    else:
        into.add_(a.to(into.dtype) @ b.to(into.dtype))


def chunk_rows(*, scored: int, hidden_size: int, vocab_size: int, itemsize: int) -> int:
    """Tokens per chunk (`fused_linear_rows`): a power of two at or below n · h / v, within bounds."""
    fewest = min(max(_power_at_most(FEWEST_LOGITS // vocab_size), FEWEST_ROWS), MAX_ROWS)
    rows = max(_power_at_most(scored * hidden_size // vocab_size), fewest)
    return max(min(rows, MAX_ROWS, max(CHUNK_BYTES // (vocab_size * itemsize), 2), scored), 1)


def unsloth_tiles(*, tokens: Iterable[int], config: Any) -> frozenset[tuple[int, int]]:
    """Shapes of the logit buffers, whole rows and tiles, for each number of scored tokens."""
    h, v = config.get_text_config().hidden_size, config.get_text_config().vocab_size
    columns = ceil_div(v, COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    rows = {chunk_rows(scored=n, hidden_size=h, vocab_size=v, itemsize=size) for n in tokens for size in (2, 4)}
    return frozenset({(n, columns) for n in rows} | {(MAX_ROWS, SPLIT_COLUMNS)})


def _power_at_most(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)
