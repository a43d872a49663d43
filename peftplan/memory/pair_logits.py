"""Losses that trainers make of all logits: of chosen and rejected rows, or of rows that are one or the other.

b rows, of pairs the first half chosen; s tokens; n of them in completions; v vocabulary. Source: trl
`experimental/orpo/orpo_trainer.py` and `experimental/cpo/cpo_trainer.py` (`concatenated_forward`), `kernels/logprob_entropy.py`
(`_LogProbEntropyFunction`; its Triton kernels take nothing); `_compute_loss` of trainer/dpo_trainer.py and
trainer/kto_trainer.py in the trl that axolotl pins; axolotl 0.19, monkeypatch/trainer/utils.py (`_SelectiveLogSoftmaxTriton`).
"""

from __future__ import annotations

from peftplan.job.trainer import Scoring
from peftplan.memory.heads import logits_of
from peftplan.memory.loss import cross_entropy
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor

CHOSEN = "b/2"
"""The rows of the chosen completions."""


def all_logits(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of every position; no loss, as the batch has no labels."""
    return Tensor(None, (), "fp32"), logits_of(model, x)


def loss_of_pairs(f: Tape, logits: Tensor, scoring: Scoring) -> Tensor:
    """`concatenated_forward` of ORPO and CPO, and the loss of its results. `logits`: in fp32."""
    batch = [f.new(("b", "s"), "int64", name) for name in ("input_ids", "attention_mask", "labels", "clone")]
    rows, seq, vocab = logits.dims
    shorter = f"{seq}-1"
    chosen = sliced(f, sliced(f, logits, (CHOSEN, seq, vocab)), (CHOSEN, shorter, vocab))
    nll = cross_entropy(f, ops.copied(f, chosen, "contiguous", viewed=False))
    del chosen
    labels = f.new((rows, shorter), "int64", "clone")
    summed = _summed(f, _log_probs(f, sliced(f, logits, (rows, shorter, vocab)), labels, scoring))
    del labels, batch
    return f.new((), "fp32", "mean", f.record(_loss_backward, (summed, nll), summed.dims))


def scored_rows(f: Tape, logits: Tensor, scoring: Scoring) -> Tensor:
    """`selective_log_softmax` of labels that are a view of the batch, and its sum over each row's completion."""
    rows, seq, vocab = logits.dims
    return _summed(f, _log_probs(f, sliced(f, logits, (rows, f"{seq}-1", vocab)), None, scoring))


def by_kind(f: Tape, logits: Tensor) -> Tensor:
    """Copies of rows by their kind, chosen and rejected; together they are as large as the logits."""
    return f.new(logits.dims, logits.dtype, "logits by kind")


def mean_logits(f: Tape, logits: Tensor, *, copies: bool) -> None:
    """The mean logits of chosen and of rejected completions, for the log: those of completions are copied.

    `copies`: all rows are copied before, by their kind, and the rows of the batch are counted as of one kind.
    """
    rows, seq, vocab = logits.dims
    of_kind = by_kind(f, logits.view((rows, f"{seq}-1", vocab))) if copies else None
    copied = f.new(("n" if copies else "n/2", vocab), logits.dtype, "index")
    means = f.new(copied.dims[:1], logits.dtype, "mean")
    del of_kind, copied, means


def _summed(f: Tape, per_token: Tensor) -> Tensor:
    """The log-probabilities of labels that count, summed over each row."""
    rows = per_token.dims[:1]
    mask = f.new(per_token.dims, "bool", "ne")
    masked = f.new(per_token.dims, "fp32", "mul", f.record(_masked_backward, (per_token,), mask))
    return f.new(rows, "fp32", "sum", f.record(_sum_backward, (masked,), masked.dims))


def _loss_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> tuple[Tensor, Tensor]:
    return f.new(saved[0], "fp32", "cat"), g


def _sum_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return Tensor(g.storage, saved[0], g.dtype)  # expanded, a view


def _masked_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "mul")


def _log_probs(f: Tape, logits: Tensor, labels: Tensor | None, scoring: Scoring) -> Tensor:
    """The log-probability of each label. `labels`: None where they are a view of the batch."""
    if scoring == "softmax":
        return _by_softmax(f, logits)
    return _by_kernel(f, logits, labels) if scoring == "kernel" else _by_flat_kernel(f, logits)


def _by_softmax(f: Tape, logits: Tensor) -> Tensor:
    """`gather` of all log-probabilities, which `log_softmax` keeps. Its kernel copies a slice of several rows (aten
    cuda/SoftMax.cu, `input_.contiguous()`)."""
    copied = f.new(logits.dims, logits.dtype, "contiguous") if f.several else None
    every = ops.keeps_output(f, logits, "log_softmax")
    del copied
    return f.new(every.dims[:-1], "fp32", "gather", f.record(_gathered_backward, (every,), every.dims))


def _gathered_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "zeros")


def _by_flat_kernel(f: Tape, logits: Tensor) -> Tensor:
    """A kernel over rows of logits, which copies the slice and keeps the copy."""
    dims = logits.dims[:-1]
    flat = ops.copied(f, logits, "reshape")
    labels = f.new(dims, "int64", "contiguous")
    node = f.record(_log_probs_backward, (flat,), flat.detach(), labels)
    out = f.new(dims, "fp32", "log-probabilities", node)
    f.keep(node, f.new(dims, "fp32", "log z"))
    return out


def _by_kernel(f: Tape, logits: Tensor, labels: Tensor | None) -> Tensor:
    """A kernel that reads the slice of the logits; entropies are made beside the log-probabilities."""
    dims = logits.dims[:-1]
    node = f.record(_log_probs_backward, (logits,))
    out = f.new(dims, "fp32", "log-probabilities", node)
    entropy, log_z, expected = (f.new(dims, "fp32", name) for name in ("entropy", "log z", "expected logit"))
    f.keep(node, logits.detach(), labels, log_z, expected)
    del entropy
    return out


def _log_probs_backward(f: Tape, node: Node, saved: tuple[Tensor, ...], g: Tensor) -> Tensor:
    return f.new(saved[0].dims, saved[0].dtype, "empty_like")
