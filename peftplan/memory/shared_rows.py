"""Losses of rows that several ranks share, each with a part of the tokens: the cross entropy of a rank's own.

s tokens of this rank, v vocabulary; in the dtype of the logits. Source: ms-swift 4.6.0, trainers/utils.py
(`per_token_loss_func_sp`), sequence_parallel/utils.py (`ChunkedCrossEntropyLoss`). Left out: one number a token, of all ranks.
"""

from __future__ import annotations

from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor


def of_tokens(f: Tape, logits: Tensor) -> Tensor:
    """`CrossEntropyLoss(reduction="none")`, summed."""
    log_probabilities = ops.keeps_output(f, logits, "log_softmax")
    node = f.record(_nll_backward, (log_probabilities,), log_probabilities)
    return ops.summed(f, f.new(logits.dims[:-1], logits.dtype, "nll_loss", node))


def _nll_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0].dims, saved[0].dtype, "nll_loss_backward")


def chunked(f: Tape, logits: Tensor) -> Tensor:
    """`ChunkedCrossEntropyLoss`: saves the logits, and computes each chunk once more in backward.

    There the name `grad_chunk` holds the gradient of the chunk before: the second one takes most, unless it is much shorter.
    """
    node = f.record(_chunks_backward, (logits,), logits.detach())
    rows: Dims = ("rows", logits.dims[-1])
    part = f.new(rows, logits.dtype, "log_softmax")
    del part
    return ops.summed(f, f.new(logits.dims[:-1], logits.dtype, "cat", node))


def _chunks_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    (logits,) = saved
    gradient = f.new(logits.dims, logits.dtype, "empty_like")
    names = ("log_softmax", "nll_loss_backward", "log_softmax_backward")
    earlier = f.new(("rows before", logits.dims[-1]), logits.dtype, "grad_chunk of the chunk before")
    parts = [f.new(("rows", logits.dims[-1]), logits.dtype, name) for name in names]
    del earlier, parts
    return gradient
