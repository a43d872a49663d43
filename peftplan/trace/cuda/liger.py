"""Liger's fused loss, on kernels without values (liger-kernel, ops/fused_linear_cross_entropy.py)."""

from __future__ import annotations

from typing import Any

import torch

from peftplan.trace.cuda.attention import Capability
from peftplan.trace.cuda.chunked import compute_dtype
from peftplan.units import ceil_div

IGNORED = -100
"""The label of positions without a loss."""
TENSOR_CORES_OF_BF16 = (8, 0)


class LigerCrossEntropy(torch.autograd.Function):
    """`LigerFusedLinearCrossEntropyFunction`: the gradients are made in forward, chunk by chunk, and kept for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, capability: Capability) -> Any:
        tokens, width = hidden.shape
        rows = liger_rows(tokens=tokens, hidden_size=width, vocab_size=weight.shape[0])
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if hidden.requires_grad and weight.requires_grad else None
        losses = hidden.new_zeros(tokens, dtype=torch.float32)
        mask = targets != IGNORED
        in_place = hidden.dtype == weight.dtype == compute_dtype(hidden)
        buffer = hidden.new_empty(rows, weight.shape[0]) if in_place else None
        for first in range(0, tokens, rows):
            chunk = hidden[first : first + rows]
            if buffer is None:
                logits = chunk @ weight.t()
            else:
                logits = buffer[: chunk.shape[0]]
                torch.mm(chunk, weight.t(), out=logits)
            if hidden.requires_grad and in_place:
                torch.mm(logits, weight, out=grad_hidden[first : first + rows])
            elif hidden.requires_grad:
                grad_hidden[first : first + rows] = logits @ weight
            if grad_weight is not None:
                _add_to_weight(grad_weight, logits, chunk, capability)
            del logits, chunk
        del buffer, mask
        loss = torch.sum(losses)
        ctx.save_for_backward(grad_hidden.detach(), None if grad_weight is None else grad_weight.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden, grad_weight, None, None


def _add_to_weight(grad_weight: torch.Tensor, logits: torch.Tensor, chunk: torch.Tensor, capability: Capability) -> None:
    """Straight into the gradient on sm80 and later; before, or with other dtypes, through a product and an fp32 copy of it."""
    half = logits.dtype in (torch.float16, torch.bfloat16)
    if capability >= TENSOR_CORES_OF_BF16 and half and grad_weight.dtype == torch.float32:
        torch.addmm(grad_weight, logits.t(), chunk.to(logits.dtype), out_dtype=torch.float32, out=grad_weight)
    elif capability >= TENSOR_CORES_OF_BF16 and half and grad_weight.dtype == logits.dtype:
        torch.addmm(grad_weight, logits.t(), chunk.to(logits.dtype), out=grad_weight)
    else:
        grad_weight += torch.mm(logits.t(), chunk).float()


def liger_rows(*, tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Tokens per chunk: as many logits as the input has elements, rounded up to a power of two of tokens."""
    chunk = ceil_div(tokens, ceil_div(vocab_size, hidden_size))
    return int(min(1 << (chunk - 1).bit_length(), tokens))
