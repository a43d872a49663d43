"""A loss of pairs from all logits: the cross entropy of chosen rows, and the log-probabilities of all of them.

b rows, of which the first half is chosen; s tokens; v vocabulary. Source: trl `experimental/orpo/orpo_trainer.py` and
`experimental/cpo/cpo_trainer.py` (`concatenated_forward`), `kernels/logprob_entropy.py` (`_LogProbEntropyFunction`; its Triton
kernels take nothing).
"""

from __future__ import annotations

from peftplan.memory.loss import cross_entropy
from peftplan.memory.model import Model
from peftplan.memory.units import TAIL
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor

CHOSEN = "b/2"
"""The rows of the chosen completions."""


def all_logits(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of every position; no loss, as the batch has no labels."""
    assert model.arch.output_embedding is not None
    logits = model.units.leave(TAIL, model.linear(model.arch.output_embedding, x))
    for op in model.arch.logits_ops:
        logits = ops.scale(model.tape, logits) if op == "scale" else ops.keeps_output(model.tape, logits, "tanh")
    return Tensor(None, (), "fp32"), logits


def loss_of_pairs(f: Tape, logits: Tensor) -> Tensor:
    """`concatenated_forward` and the loss of its results. `logits`: in fp32, as accelerate returns them."""
    batch = [f.new(("b", "s"), "int64", name) for name in ("input_ids", "attention_mask", "labels", "clone")]
    rows, seq, vocab = logits.dims
    shorter = f"{seq}-1"
    chosen = sliced(f, sliced(f, logits, (CHOSEN, seq, vocab)), (CHOSEN, shorter, vocab))
    nll = cross_entropy(f, ops.copied(f, chosen, "contiguous", viewed=False))
    del chosen
    labels = f.new((rows, shorter), "int64", "clone")
    mask = f.new((rows, shorter), "bool", "ne")
    per_token = _log_probs(f, sliced(f, logits, (rows, shorter, vocab)), labels)
    masked = f.new(per_token.dims, "fp32", "mul", f.record(_masked_backward, (per_token,), mask))
    summed = f.new((rows,), "fp32", "sum", f.record(_sum_backward, (masked,), masked.dims))
    del masked
    del batch
    return f.new((), "fp32", "mean", f.record(_loss_backward, (summed, nll), summed.dims))


def _loss_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> tuple[Tensor, Tensor]:
    return f.new(saved[0], "fp32", "cat"), g


def _sum_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return Tensor(g.storage, saved[0], g.dtype)  # expanded, a view


def _masked_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "mul")


def _log_probs(f: Tape, logits: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of each label; entropies are made beside them."""
    dims = logits.dims[:-1]
    node = f.record(_log_probs_backward, (logits,))
    out = f.new(dims, "fp32", "log-probabilities", node)
    entropy, log_z, expected = (f.new(dims, "fp32", name) for name in ("entropy", "log z", "expected logit"))
    f.keep(node, logits.detach(), labels, log_z, expected)
    del entropy
    return out


def _log_probs_backward(f: Tape, node: Node, saved: tuple[Tensor, ...], g: Tensor) -> Tensor:
    return f.new(saved[0].dims, saved[0].dtype, "empty_like")
