"""LLaMA-Factory's ASFT: the cross entropy of each token, weighted by its probability, and the divergence from a reference model.

b rows, s tokens, v vocabulary. Source: llamafactory 0.9.5, train/sft/trainer.py:151 (`compute_loss`), train/trainer_utils.py:686
(`asft_loss_func`, `_kl_divergence`); aten Loss.cpp (`kl_div`). Every token is taken as scored.
"""

from __future__ import annotations

from peftplan.memory.loss import nll_of_tokens
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Tensor


def anchored(f: Tape, logits: Tensor, of_reference: Tensor) -> Tensor:
    """The loss of the next tokens. The caller holds the logits of both models.

    Locals of a Python function live until it returns. When the divergence is made, its difference, product and entropy are alive
    beside the logits in fp32, their copies without the last position, two tensors of log probabilities and the reference's
    probabilities.
    """
    wide = f.to(logits, "fp32")
    batch, seq, vocab = wide.dims
    dims: Dims = (batch, f"{seq}-1", vocab)
    shifted = _shifted(f, wide, dims)
    labels = f.new(dims[:2], "int64", "contiguous")
    shifted_reference = _shifted(f, of_reference, dims)
    rows = ops.reshaped(f, shifted)
    weighted = _weighted(f, rows, labels)
    loss = ops.add(f, weighted, ops.scale(f, _divergence(f, rows, shifted_reference)))
    del wide, shifted, shifted_reference
    return loss


def _shifted(f: Tape, logits: Tensor, dims: Dims) -> Tensor:
    """`logits[..., :-1, :].contiguous()`, which copies several rows."""
    view = sliced(f, logits, dims)
    return ops.copied(f, view, "contiguous", viewed=False) if f.several else view


def _weighted(f: Tape, logits: Tensor, labels: Tensor) -> Tensor:
    of_token = nll_of_tokens(f, logits, labels)
    valid = ops.scale(f, of_token, "index")
    probabilities = f.new(labels.dims, "fp32", "exp")
    weighted = ops.mul(f, valid, probabilities)
    del of_token, valid, probabilities
    return ops.scale(f, ops.summed(f, weighted), "div")


def _divergence(f: Tape, logits: Tensor, of_reference: Tensor) -> Tensor:
    log_mine = ops.keeps_output(f, logits, "log_softmax")
    theirs = f.new(of_reference.dims, of_reference.dtype, "softmax")
    entropy = f.new(theirs.dims, theirs.dtype, "xlogy")
    product = ops.mul(f, theirs, log_mine)
    difference = ops.scale(f, product, "sub")
    del entropy, product
    of_token = ops.summed(f, difference, logits.dims[:2])
    del difference
    total = ops.summed(f, ops.scale(f, of_token))
    del log_mine, theirs, of_token
    return ops.scale(f, total, "div")
