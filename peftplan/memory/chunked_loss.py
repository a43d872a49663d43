"""TRL's loss, which projects hidden states in tiles, and what SFTTrainer makes of it.

n scored tokens, h hidden size, v vocabulary; every label counts as scored. Source: trl `kernels/chunked_logprob.py`
(`ChunkedLogProbFunction`), `trainer/utils.py` (`add_fused_lm_head`), `SFTTrainer.compute_loss`. Its Triton kernels take nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from peftplan.job.loss_sizes import VOCAB_TILE
from peftplan.ledger import Dim
from peftplan.memory.loss import chunks, projection, read_by_loss
from peftplan.memory.model import Model
from peftplan.memory.units import TAIL
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

LABELS = ("b", "s-1")
"""Positions that have a next token."""
RUNNING = 6
"""Running maximum, sums of exponentials, of their squares and of x times them, of logits, maximum before the target."""


def trl_chunked(model: Model, x: Tensor) -> tuple[Tensor, ...]:
    """`add_fused_lm_head`'s forward: loss, log-probabilities, entropy, whether the label came first, and which labels count."""
    f = model.tape
    hidden = sliced(f, x, (*LABELS, x.dims[-1]))
    head = projection(model)
    read_by_loss(f, head)
    f.module = ""
    mask = f.new(LABELS, "bool", "label mask")
    weight = model.units.as_read(TAIL, head.own_weight)
    bias = None if head.bias is None else model.units.as_read(TAIL, head.bias)
    chosen = rows_of(f, hidden, mask)
    targets = rows_of(f, Tensor(None, LABELS, "int64"), mask)
    per_label = _log_probs(model, chosen, weight, bias, targets)
    del chosen, targets
    log_probs, *others = (_scattered(f, part, mask) for part in per_label)
    del per_label
    loss = _mean(f, ops.scale(f, ops.summed(f, log_probs), "neg"), mask)
    return loss, log_probs, *others, mask


def sum_of_rows(f: Tape, log_probs: Tensor) -> Tensor:
    """`log_probs[:, -seq_len:].sum(dim=1)`: the log-probability of each row's completion."""
    sliced_ = Tensor(log_probs.storage, log_probs.dims, log_probs.dtype, f.record(_zero_padded_backward, (log_probs,)))
    return ops.summed(f, sliced_, ("b",))


def _zero_padded_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "slice_backward")


def loss_of_rows(f: Tape, sums: Sequence[Tensor]) -> Tensor:
    """The mean over rows of what a preference loss makes of their log-probabilities."""
    trained = tuple(x for x in sums if x.node is not None)
    return f.new((), "fp32", "mean", f.record(_loss_of_rows_backward, trained, *(x.dims for x in trained)))


def _loss_of_rows_backward(f: Tape, node: Node, saved: tuple[Dims, ...], g: Tensor) -> list[Tensor]:
    return [f.new(dims, g.dtype, "cat") for dims in saved]


def loss_of_trl(f: Tape, log_probs: Tensor, *others: Tensor) -> Tensor:
    """`SFTTrainer.compute_loss`: the loss from log-probabilities; entropy and accuracy are summed while they live."""
    *metrics, mask = others
    per_token = ops.scale(f, log_probs, "neg")
    tokens = f.new((), "int64", "sum")
    loss = _mean(f, ops.summed(f, per_token), mask, tokens)
    for metric in metrics:
        total = f.new((), "int64" if metric.dtype == "bool" else "fp32", "sum")
        mean = f.new((), "fp32", "div")
        del total, mean
    return loss


def _mean(f: Tape, total: Tensor, mask: Tensor, tokens: Tensor | None = None) -> Tensor:
    """`total / mask.sum().clamp(min=1)`."""
    if tokens is None:
        tokens = f.new((), "int64", "sum")
    count = f.new((), "int64", "clamp")
    node = f.record(_mean_backward, (total,), count)
    return f.new((), "fp32", "div", node)


def _mean_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new((), g.dtype, "div")


def rows_of(f: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """`x[mask]`: indices of the chosen in passing, then their rows."""
    rest = x.dims[len(mask.dims) :]
    node = f.record(_rows_backward, (x,), mask, x.dims)
    indices = f.new(("n", len(mask.dims)), "int64", "nonzero")
    out = f.new(("n", *rest), x.dtype, "index", node)
    del indices
    return out


def _rows_backward(f: Tape, node: Node, saved: tuple[Tensor, Dims], g: Tensor) -> Tensor:
    mask, dims = saved
    out = f.new(dims, g.dtype, "new_zeros")
    indices = f.new(("n", len(mask.dims)), "int64", "nonzero")
    del indices
    return out


def _scattered(f: Tape, chosen: Tensor, mask: Tensor) -> Tensor:
    """`chosen.new_zeros(mask.shape).masked_scatter(mask, chosen)`: with a prefix sum in passing."""
    node = f.record(_scattered_backward, (chosen,), mask)
    zeros = f.new(mask.dims, chosen.dtype, "new_zeros")
    out = f.new(mask.dims, chosen.dtype, "masked_scatter", node)
    prefix_sum = f.new(mask.dims, "int64", "prefix sum")
    del zeros, prefix_sum
    return out


def _scattered_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    indices = f.new(("n", len(saved[0].dims)), "int64", "nonzero")
    out = f.new(("n",), g.dtype, "masked_select")
    del indices
    return out


def _vocab_tiles(vocab: Dim) -> Iterator[int]:
    assert isinstance(vocab, int)
    return (min(VOCAB_TILE, vocab - start) for start in range(0, vocab, VOCAB_TILE))


def _buffer(f: Tape, dtype: str) -> Tensor:
    buffer = f.new(("rows", VOCAB_TILE), dtype, "logits, in tiles")
    f.category[buffer.storage.number] = "logits"  # type: ignore[union-attr]
    return buffer


LogProbs: TypeAlias = tuple[Tensor, Operand, Operand | None, Tensor, Tensor, Tensor, Sequence[Dim], str]
"""What `_log_probs` saves: hidden states, weight, bias, targets, log Z, entropy, the rows of each chunk, the products' dtype."""


def _log_probs(model: Model, hidden: Tensor, weight: Operand, bias: Operand | None, targets: Tensor) -> tuple[Tensor, ...]:
    """`ChunkedLogProbFunction`: the log-probability of each label, from tiles of logits, and `running.token_outputs`."""
    f = model.tape
    parts = chunks(model)
    node = f.record(_log_probs_backward, (hidden, weight, bias))
    dtype = f.autocast or hidden.dtype
    sums = f.many(("n",), "fp32", "running sums", RUNNING + 1)  # and the logit of the target
    buffer = _buffer(f, dtype)
    chunk = None
    for rows in parts:
        chunk = _cast(f, (rows, hidden.dims[-1]), hidden.dtype, dtype)
        for columns in _vocab_tiles(weight.dims[0]):
            part = _cast(f, (columns, hidden.dims[-1]), weight.dtype, dtype)
            f.products.append((len(f.log), "cuBLAS"))
            del part
            part = None if bias is None else _cast(f, (columns,), bias.dtype, dtype)
            del part
    temporary = f.new(("n",), "fp32", "log")
    log_z = f.new(("n",), "fp32", "add")
    del temporary
    log_probs = f.new(("n",), "fp32", "sub", node)
    others = [_token_output(f, name, node) for name in model.running.token_outputs]
    f.keep(node, hidden.detach(), weight, bias, targets, log_z, others[0].detach() if others else log_z, parts, dtype)
    del sums, buffer, chunk
    return log_probs, *others


def _token_output(f: Tape, name: str, node: Node | None) -> Tensor:
    """One of the outputs beside the log-probabilities; entropy comes first, and has a gradient."""
    if name == "entropy":
        temporary = f.new(("n",), "fp32", "div")
        entropy = f.new(("n",), "fp32", "sub", node)
        entropy.index = 1
        del temporary
        return entropy
    if name == "mean_logits":
        return f.new(("n",), "fp32", "div")
    temporary = f.many(("n",), "bool", "ge, gt", 2)
    return f.new(("n",), "bool", "bitwise_and")


def _cast(f: Tape, dims: tuple[Dim, ...], current: str, dtype: str) -> Tensor | None:
    """A part in another dtype: a copy, or nothing where it has it."""
    return None if current == dtype else f.new(dims, dtype, "to")


def _log_probs_backward(f: Tape, node: Node, saved: LogProbs, *grads: Tensor | None) -> Gradients:
    """Tiles are projected again, and their gradients added up in fp32."""
    hidden, weight, bias, _, _, _, parts, dtype = saved
    wide = [
        f.new(x.dims, "fp32", "new_zeros") if edge and x is not None else None
        for x, edge in zip((hidden, weight, bias), node.edges, strict=True)
    ]
    buffer = _buffer(f, dtype)
    chunk = part = None
    for rows in parts:
        chunk = _cast(f, (rows, hidden.dims[-1]), hidden.dtype, dtype)
        for columns in _vocab_tiles(weight.dims[0]):
            part = _cast(f, (columns, hidden.dims[-1]), weight.dtype, dtype)
            f.products.append((len(f.log), "cuBLAS"))
            temporary = None if bias is None else _cast(f, (columns,), bias.dtype, dtype)
            del temporary
            temporary = f.new((columns,), "fp32", "sum") if node.edges[2] else None
            del temporary
    narrow = tuple(
        None if w is None or x is None else f.to(w, x.dtype) for w, x in zip(wide, (hidden, weight, bias), strict=True)
    )
    while wide:  # locals of a Python function go in the order of their first assignment
        wide.pop(0)
    del chunk, part, buffer
    return narrow
