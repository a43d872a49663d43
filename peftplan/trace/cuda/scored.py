"""Which tokens a loss scores: selections by a mask, whose size depends on the data, so the caller gives it.

Source: torch aten/src/ATen/native/cuda/IndexKernel.cu (`nonzero` makes the indices, int64, one per dimension of the mask),
`masked_scatter` (a prefix sum, int64, per element of the mask), tools/autograd/derivatives.yaml (what each keeps).
"""

from __future__ import annotations

from typing import Any

import torch


def scored_tokens(labels: torch.Tensor, prompt: int) -> int:
    """Labels that have a token before them: all but each row's first, unless `prompt` unlabelled ones come before it."""
    rows, length = labels.shape
    return int(rows * (length - max(prompt, 1)))


class Rows(torch.autograd.Function):
    """`tensor[mask]` of which `count` elements are chosen."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
        ctx.save_for_backward(mask)
        ctx.shape = tensor.shape
        indices = mask.new_empty(count, mask.dim(), dtype=torch.int64)
        out = tensor.new_empty(count, *tensor.shape[mask.dim() :])
        del indices
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        (mask,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.shape)
        indices = mask.new_empty(grad.shape[0], mask.dim(), dtype=torch.int64)
        del indices
        return out, None, None


class Scattered(torch.autograd.Function):
    """`chosen.new_zeros(mask.shape).masked_scatter(mask, chosen)`."""

    @staticmethod
    def forward(ctx: Any, chosen: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask)
        ctx.count = chosen.shape[0]
        zeros = chosen.new_zeros(mask.shape)
        out = zeros.clone()
        prefix_sum = mask.new_empty(mask.shape, dtype=torch.int64)
        del zeros, prefix_sum
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        if grad is None:
            return None, None
        (mask,) = ctx.saved_tensors
        indices = mask.new_empty(ctx.count, mask.dim(), dtype=torch.int64)
        out = grad.new_empty(ctx.count)
        del indices
        return out, None
