"""Cut cross entropy on kernels without values.

Source: axolotl's fork of cut-cross-entropy (github.com/axolotl-ai-cloud/ml-cross-entropy at 5f0c7a7): `utils.py`
(`_build_flat_valids`), `cce.py`, `cce_lse_forward.py`, `indexed_dot.py`, `cce_backward.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from peftplan.job.loss_sizes import LOCKED_COLUMNS, LOCKED_ROWS, SORTED_BYTES
from peftplan.units import ceil_div


class CutCrossEntropy(torch.autograd.Function):
    """`LinearCrossEntropyFunction`, and `_build_flat_valids` before it: the summed loss of `scored` labels."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        scored: int,
        capped: bool,
    ) -> Any:
        valid = _valid(labels, scored)
        log_sum = hidden.new_empty(scored, dtype=torch.float32)
        locks = hidden.new_empty(ceil_div(scored, LOCKED_ROWS), dtype=torch.int32)
        average = hidden.new_empty(weight.shape[0], dtype=torch.float32) if any(ctx.needs_input_grad) else None
        del locks
        negative = hidden.new_empty(scored, dtype=torch.float32)
        if capped:
            negative = negative.clone()
        loss = negative.add_(log_sum).sum()
        ctx.save_for_backward(hidden, weight, bias, log_sum, labels, valid, average)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        hidden, weight, bias, log_sum, _, _, average = ctx.saved_tensors
        ordering = _order(average)
        into_hidden, into_weight, into_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if into_hidden else None
        grad_weight = torch.zeros_like(weight) if into_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if into_bias else None
        columns = ceil_div(hidden.shape[1], LOCKED_COLUMNS)
        of = [log_sum.shape[0]] * into_hidden + [weight.shape[0]] * into_weight
        locks = [hidden.new_empty(ceil_div(rows, LOCKED_ROWS), columns, dtype=torch.int32) for rows in of]
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        del ordering, locks
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _valid(labels: torch.Tensor, scored: int) -> torch.Tensor:
    mask = labels.new_empty(scored, dtype=torch.bool)
    wide = labels.new_empty(scored, 2)
    del mask
    narrow = wide.to(torch.int32)
    del wide
    return narrow.sum(1)


def _order(average: torch.Tensor) -> torch.Tensor:
    """`argsort`, as int32."""
    values, indices = average.clone(), torch.empty_like(average, dtype=torch.int64)
    of_sort = torch.empty_like(indices), torch.empty(SORTED_BYTES * average.shape[0], dtype=torch.uint8, device=average.device)
    del of_sort, values
    ordering = indices.to(torch.int32)
    del indices
    return ordering
