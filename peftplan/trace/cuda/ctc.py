"""The CTC loss of speech encoders, as transformers calls it and CUDA runs it, on tensors without values.

Letters: b batch, t frames, v vocabulary, u labels. torch's own kernel runs, since transformers turns cuDNN's off.
Source: transformers loss/loss_ctc.py; torch aten/src/ATen/native/cuda/LossCTC.cu (`ctc_loss_gpu_template`,
`ctc_loss_backward_gpu_template`). Assumed: every label counts, none is padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def ctc_on_cuda() -> Iterator[None]:
    """Let models whose class ends in `ForCTC` compute their loss here."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    with patch.dict(LOSS_MAPPING, {"ForCTC": _loss}):
        yield


def _loss(logits: torch.Tensor, labels: torch.Tensor, logit_lengths: torch.Tensor, **_: Any) -> torch.Tensor:
    """`ForCTCLoss`: fp32 log-probabilities [t, b, v], targets without padding, one loss."""
    mask = labels != 0
    lengths = mask.sum(-1)
    targets = labels.new_empty(labels.numel())
    log_probs = torch.nn.functional.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
    losses: torch.Tensor = _Ctc.apply(log_probs, targets, lengths, labels.shape[-1])  # type: ignore[no-untyped-call]
    return (losses / lengths.clamp(min=1)).mean()


class _Ctc(torch.autograd.Function):
    """Keeps the log-probabilities, the targets, and the fp32 lattice of forward sums: two states per label and one more."""

    @staticmethod
    def forward(ctx: Any, log_probs: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor, u: int) -> torch.Tensor:
        t, b, _ = log_probs.shape
        offsets = lengths.new_empty(b)
        log_alpha = log_probs.new_empty(b, t, 2 * u + 1)
        out = log_probs.new_empty(b)
        ctx.save_for_backward(log_probs, targets, log_alpha, out)
        del offsets
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        log_probs, _, log_alpha, _ = ctx.saved_tensors
        log_beta = torch.empty_like(log_alpha)
        grad = torch.empty(log_probs.shape, dtype=log_probs.dtype, device=log_probs.device)
        del log_beta
        return grad, None, None, None
