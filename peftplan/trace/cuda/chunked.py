"""TRL's chunked loss, on kernels without values (trl, kernels/chunked_logprob.py)."""

from __future__ import annotations

from typing import Any

import torch

TOKEN_TILE = 4096
VOCAB_TILE = 32768
"""TRL projects tiles of so many tokens times so many vocabulary entries; its buffer has that width whatever the vocabulary."""


class ChunkedLogProbs(torch.autograd.Function):
    """`ChunkedLogProbFunction` with entropy and `is_top1`: tiles are projected in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        tokens, vocab = hidden.shape[0], weight.shape[0]
        dtype = compute_dtype(hidden)
        # running maximum, sums of exponentials, of their squares and of x times them, of logits, maximum before the target
        running = [hidden.new_empty(tokens, dtype=torch.float32) for _ in range(6)]
        target_logit = hidden.new_empty(tokens, dtype=torch.float32)
        buffer = hidden.new_empty(min(tokens, TOKEN_TILE), VOCAB_TILE, dtype=dtype)
        for first in range(0, tokens, TOKEN_TILE):
            chunk = hidden[first : first + TOKEN_TILE].to(dtype)
            for start in range(0, vocab, VOCAB_TILE):
                tile = buffer[: chunk.shape[0], : min(VOCAB_TILE, vocab - start)]
                torch.mm(chunk, weight[start : start + VOCAB_TILE].to(dtype).t(), out=tile)
                if bias is not None:
                    tile.add_(bias[start : start + VOCAB_TILE].to(dtype))
        log_z = running[0] + torch.log(running[1])
        log_probs = target_logit - log_z
        entropy = log_z - running[2] / running[1]
        is_top1 = (target_logit >= running[0]) & (target_logit > running[5])
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, bias, *_ = ctx.saved_tensors
        tokens, vocab, dtype = hidden.shape[0], weight.shape[0], ctx.dtype
        into_hidden, into_weight, into_bias = ctx.needs_input_grad[:3]
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if into_hidden else None
        grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if into_weight else None
        grad_bias = bias.new_zeros(bias.shape, dtype=torch.float32) if into_bias else None
        buffer = hidden.new_empty(min(tokens, TOKEN_TILE), VOCAB_TILE, dtype=dtype)
        for first in range(0, tokens, TOKEN_TILE):
            chunk = hidden[first : first + TOKEN_TILE].to(dtype)
            for start in range(0, vocab, VOCAB_TILE):
                part = weight[start : start + VOCAB_TILE].to(dtype)
                tile = buffer[: chunk.shape[0], : part.shape[0]]
                torch.mm(chunk, part.t(), out=tile)
                if bias is not None:
                    tile.add_(bias[start : start + VOCAB_TILE].to(dtype))
                if grad_hidden is not None:
                    accumulate(grad_hidden[first : first + TOKEN_TILE], tile, part)
                if grad_weight is not None:
                    accumulate(grad_weight[start : start + VOCAB_TILE], tile.t(), chunk)
                if grad_bias is not None:
                    grad_bias[start : start + VOCAB_TILE] += tile.sum(dim=0, dtype=torch.float32)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


def accumulate(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`into += a @ b` for fp32 `into`: cuBLAS writes fp32 from 16-bit factors; other factors are cast first."""
    if a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
    else:
        into.addmm_(a.float(), b.float())


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Autocast's dtype, else the input's."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
