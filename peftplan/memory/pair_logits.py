"""Losses that trainers make of all logits: of chosen and rejected rows, or of rows that are one or the other.

b rows, of pairs the first half chosen; s tokens; n of them in completions; v vocabulary. Source: trl
`experimental/orpo/orpo_trainer.py` and `experimental/cpo/cpo_trainer.py` (`concatenated_forward`), `kernels/logprob_entropy.py`
(`_LogProbEntropyFunction`; its Triton kernels take nothing); `_compute_loss` of trainer/dpo_trainer.py and
trainer/kto_trainer.py in the trl that axolotl pins; axolotl 0.19, monkeypatch/trainer/utils.py (`_SelectiveLogSoftmaxTriton`);
`selective_log_softmax` of trainer/utils.py in the newest trl that ms-swift 4.6.0 accepts; ms-swift 4.6.0, rlhf_trainers
(`_get_logps_via_local_forward`); torchtune 0.6.1, rlhf/sequence_processing.py (`logits_to_logprobs`).
"""

from __future__ import annotations

from peftplan.job.trainer_words import Scoring
from peftplan.ledger import Dim
from peftplan.memory.heads import logits_of
from peftplan.memory.loss import plain_cross_entropy
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor

CHOSEN, THIRD = "b/2", "b/3"
"""The rows of the chosen completions, of pairs and of triples."""


def all_logits(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of every position; no loss, as the batch has no labels."""
    return Tensor(None, (), "fp32"), logits_of(model, x)


def loss_of_pairs(f: Tape, logits: Tensor, scoring: Scoring, *, count: int) -> Tensor:
    """`concatenated_forward` of ORPO and CPO, and the loss of its results. `logits`: in fp32, of `count` rows."""
    batch = [f.new(("b", "s"), "int64", name) for name in ("input_ids", "attention_mask", "labels", "clone")]
    rows, seq, vocab = logits.dims
    shorter = f"{seq}-1"
    chosen = sliced(f, sliced(f, logits, (CHOSEN, seq, vocab)), (CHOSEN, shorter, vocab))
    chosen = ops.copied(f, chosen, "contiguous", viewed=False) if count > 2 else chosen  # of one row it is contiguous
    nll = plain_cross_entropy(f, chosen)
    del chosen
    labels = f.new((rows, shorter), "int64", "clone")
    summed = _summed(f, _log_probs(f, sliced(f, logits, (rows, shorter, vocab)), labels, scoring, count))
    del labels, batch
    return f.new((), "fp32", "mean", f.record(_loss_backward, (summed, nll), summed.dims))


def loss_of_triples(f: Tape, logits: Tensor, scoring: Scoring, *, count: int) -> Tensor:
    """TPO's loss: of rows that are chosen, rejected or the reference, the log-probabilities, and the cross entropy of the tokens
    of reference completions, whose logits are copied (trl `TPOTrainer._compute_loss`).
    """
    rows, seq, vocab = logits.dims
    shorter = f"{seq}-1"
    view = sliced(f, logits, (rows, shorter, vocab))
    summed = _summed(f, _log_probs(f, view, None, scoring, count))
    third: Dims = (THIRD, shorter, vocab)
    reference = Tensor(view.storage, third, view.dtype, f.record(_third_backward, (view,), view.dims))
    tokens = f.new(third[:2], "bool", "to")
    scored = f.new(("n/3", vocab), logits.dtype, "index", f.record(_indexed_backward, (reference,), third, tokens))
    nll = plain_cross_entropy(f, scored)
    del reference, scored
    loss = f.new((), "fp32", "add", f.record(_loss_backward, (summed, nll), summed.dims))
    mean_logits(f, logits, name="n/3", copies=False)
    return loss


def _third_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    """Parts without a gradient get zeros, then all are put together (torch FunctionsManual.cpp, `split_with_sizes_backward`)."""
    zeros = [f.new(g.dims, g.dtype, "zeros") for _ in range(2)]
    whole = f.new(saved[0], g.dtype, "cat")
    del zeros
    return whole


def _indexed_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "new_zeros")


def loss_of_completions(f: Tape, logits: Tensor, scoring: Scoring, *, count: int, entropies: int, as_they_are: bool) -> Tensor:
    """The loss of completions that the policy wrote: their logits, all but the last, are divided by the temperature in place, or
    stay as they are, and are cut twice (trl, experimental/ssd/ssd_trainer.py, `compute_loss`).
    `entropies`: of so many tokens of a row they are made too, and what they keep for gradients lives until the loss is made.
    """
    dims = _but_last(logits.dims)
    if as_they_are:
        scored = sliced(f, sliced(f, logits, dims), dims)
    else:
        node = f.record(_divided_backward, (logits,), logits.dims, dims)
        scored = sliced(f, Tensor(logits.storage, logits.dims, logits.dtype, node), dims)
    del logits
    per_token = _log_probs(f, scored, None, scoring, count)
    kept = _entropies(f, scored, count * entropies, several=count > 1) if entropies else []
    del scored
    loss = f.new((), "fp32", "mean", f.record(_masked_backward, (per_token,), per_token.dims))
    del kept
    return loss


def divided_rows(f: Tape, logits: Tensor, completions: Dims, *, count: int) -> Tensor:
    """The log-probabilities of completions, whose logits are divided by the temperature in place, row by row."""
    node = f.record(_divided_backward, (logits,), logits.dims, completions)
    return _by_rows(f, sliced(f, Tensor(logits.storage, logits.dims, logits.dtype, node), completions), count)


def loss_of_shared_row(f: Tape, logits: Tensor, *, count: int) -> Tensor:
    """The same of a rank's part of a row that several share: all its logits are divided into a tensor of their own."""
    divided = ops.scale(f, logits, "div")
    per_token = _by_rows(f, divided, count)
    del logits, divided
    return f.new((), "fp32", "mean", f.record(_masked_backward, (per_token,), per_token.dims))


ENTROPIES_AT_ONCE = 128
"""Tokens (trainer/utils.py, `entropy_from_logits`, in the newest trl that ms-swift 4.6.0 accepts)."""


def _entropies(f: Tape, divided: Tensor, tokens: int, *, several: bool) -> list[Tensor]:
    """`entropy_from_logits`: of a copy of the slice, where rows are several. Log-probabilities and probabilities stay."""
    vocab, dtype, kept = divided.dims[-1], divided.dtype, []
    flat = f.new(divided.dims, dtype, "reshape") if several else None
    for start in range(0, tokens, ENTROPIES_AT_ONCE):
        part: Dims = (min(ENTROPIES_AT_ONCE, tokens - start), vocab)
        kept += [f.new(part, dtype, name) for name in ("log_softmax", "exp")]
        product = f.new(part, dtype, "mul")
        del product
    del flat
    return kept


def _but_last(dims: Dims) -> Dims:
    """The dims of logits without those of the last token, which predict nothing."""
    rows, seq, vocab = dims
    return rows, seq - 1 if isinstance(seq, int) else f"{seq}-1", vocab


def _divided_backward(f: Tape, node: Node, saved: tuple[Dims, Dims], g: Tensor) -> Tensor:
    """Of a slice that is written in place (torch csrc/autograd/functions/tensor.cpp, `CopySlices`)."""
    whole, part = saved
    result = f.new(whole, g.dtype, "CopySlices")
    parts = [f.new(part, g.dtype, name) for name in ("clone", "div")]
    del parts
    return result


def scored_rows(f: Tape, logits: Tensor, scoring: Scoring, *, count: int) -> Tensor:
    """`selective_log_softmax` of labels that are a view of the batch, and its sum over each row's completion."""
    if scoring == "rows":  # whose labels are turned by one place
        return _summed(f, _log_probs(f, logits, None, scoring, count))
    rows, seq, vocab = logits.dims
    if scoring in ("completions", "rows of completions"):  # with the token before them
        completions = sliced(f, logits, (rows, "n/b", vocab))
        del logits
        return _summed(f, _by_softmax(f, completions) if scoring == "completions" else _by_rows(f, completions, count))
    return _summed(f, _log_probs(f, sliced(f, logits, (rows, f"{seq}-1", vocab)), None, scoring, count))


def by_kind(f: Tape, logits: Tensor) -> Tensor:
    """Copies of rows by their kind, chosen and rejected; together they are as large as the logits."""
    return f.new(logits.dims, logits.dtype, "logits by kind")


def mean_logits(f: Tape, logits: Tensor, *, copies: bool, name: str = "n/2") -> None:
    """The mean logits of chosen and of rejected completions, for the log: those of completions, `name` tokens, are copied.

    `copies`: all rows are copied before, by their kind, and the rows of the batch are counted as of one kind.
    """
    rows, seq, vocab = logits.dims
    of_kind = by_kind(f, logits.view((rows, f"{seq}-1", vocab))) if copies else None
    copied = f.new(("n" if copies else name, vocab), logits.dtype, "index")
    means = f.new(copied.dims[:1], logits.dtype, "mean")
    del of_kind, copied, means


def _summed(f: Tape, per_token: Tensor) -> Tensor:
    """The log-probabilities of labels that count, summed over each row."""
    rows = per_token.dims[:1]
    mask = f.new(per_token.dims, "bool", "ne")
    masked = f.new(per_token.dims, "fp32", "mul", f.record(_masked_backward, (per_token,), mask))
    return ops.summed(f, masked, rows)


def _loss_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> tuple[Tensor, Tensor]:
    return f.new(saved[0], "fp32", "cat"), g


def _masked_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "mul")


def _log_probs(f: Tape, logits: Tensor, labels: Tensor | None, scoring: Scoring, count: int) -> Tensor:
    """The log-probability of each label. `labels`: None where they are a view of the batch. `count`: rows."""
    if scoring == "softmax":
        return _by_softmax(f, logits)
    if scoring == "divided softmax":
        return gathered_log_probs(f, ops.keeps_output(f, ops.scale(f, logits, "div"), "log_softmax"))
    if scoring == "rows":
        return _by_rows(f, logits, count)
    return _by_kernel(f, logits, labels) if scoring == "kernel" else _by_flat_kernel(f, logits)


def _by_softmax(f: Tape, logits: Tensor) -> Tensor:
    """`gather` of all log-probabilities, which `log_softmax` keeps. Its kernel, which has its output already, copies a
    slice of several rows (aten cuda/SoftMax.cu, `input_.contiguous()`)."""
    every = ops.keeps_output(f, logits, "log_softmax")
    copied = f.new(logits.dims, logits.dtype, "contiguous") if f.several else None
    del copied
    return gathered_log_probs(f, every)


def gathered_log_probs(f: Tape, every: Tensor) -> Tensor:
    return f.new(every.dims[:-1], "fp32", "gather", f.record(_gathered_backward, (every,), every.dims))


def _gathered_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor] | tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "zeros")


def _by_rows(f: Tape, logits: Tensor, count: int) -> Tensor:
    """`gather` of the logits less their `logsumexp`, row by row (aten ReduceOps.cpp, `logsumexp_out_impl`); in 16 bits of the
    `log_softmax` of each row.

    The backward of `logsumexp` (FunctionsManual.cpp, `logsumexp_backward`) makes three tensors of a row; the gradients of rows
    are stacked.
    """
    rows, *of_row = logits.dims
    chosen = None
    if logits.dtype == "fp32":
        gathered = f.record(_gathered_backward, (logits,), logits.dims, logits.detach())
        chosen = f.new((rows, of_row[0]), "fp32", "gather", gathered)
    unbound = f.record(_unbound_backward, (logits,), logits.dims)
    numbers, every = [], None
    for number in range(count):
        row = Tensor(logits.storage, tuple(of_row), logits.dtype, unbound, number)
        if chosen is None:
            every = ops.keeps_output(f, row, "log_softmax")  # the loop's variable: that of the row before lives until then
            gathered = f.record(_gathered_backward, (every,), every.dims, every.detach())
            numbers.append(f.new(row.dims[:1], row.dtype, "gather", gathered))
        else:
            numbers.append(_logsumexp(f, row))
        del row
    stacked = f.new((rows, of_row[0]), logits.dtype, "stack", f.record(_stacked_backward, tuple(numbers), of_row[0], count))
    numbers.clear()
    if chosen is None:
        return stacked
    return f.new(stacked.dims, "fp32", "sub", f.record(_difference_backward, (chosen, stacked)))


def _logsumexp(f: Tape, row: Tensor) -> Tensor:
    exponentials = f.new(row.dims, "fp32", "exp")
    del exponentials
    return f.new(row.dims[:1], "fp32", "logsumexp", f.record(_logsumexp_backward, (row,), row.detach()))


def _difference_backward(f: Tape, node: Node, saved: object, g: Tensor) -> tuple[Tensor, Tensor]:
    return g, f.new(g.dims, "fp32", "neg")


def _stacked_backward(f: Tape, node: Node, saved: tuple[Dim, int], g: Tensor) -> list[Tensor]:
    return [Tensor(g.storage, (saved[0],), g.dtype) for _ in range(saved[1])]


def _logsumexp_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    parts = [f.new(saved[0].dims, "fp32", name) for name in ("sub", "exp", "mul")]
    return parts[-1]


def _unbound_backward(f: Tape, node: Node, saved: tuple[Dims], *grads: Tensor) -> Tensor:
    return f.new(saved[0], grads[0].dtype, "stack")


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
