"""Heads that transformers has for every decoder: one score per sequence, or one per token.

Source: transformers, modeling_layers.py (`GenericForSequenceClassification`, `GenericForTokenClassification`),
loss/loss_utils.py.
"""

from __future__ import annotations

from peftplan.memory.loss import plain_cross_entropy
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor


def last_token(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of every token; the head takes those of each sequence's last token that is not padding. With virtual tokens, which
    arrive as `inputs_embeds`, it takes those of the last token."""
    f = model.tape
    logits = model.linear("score", x)
    f.module = ""
    if model.seq == "k":
        pooled = ops.selected(f, logits, (logits.dims[0], logits.dims[2]))
        pooled = indexed(f, pooled, pooled.dims)
        return plain_cross_entropy(f, pooled), pooled
    mask, numbers = f.new(("b", model.seq), "int32", "non_pad_mask"), f.new((model.seq,), "int32", "token_indices")
    last = f.new(("b",), "int64", "last_non_pad_token")
    pooled = indexed(f, logits, ("b", logits.dims[2]))
    loss = plain_cross_entropy(f, pooled)
    del mask, numbers, last
    return loss, pooled


def indexed(f: Tape, x: Tensor, dims: Dims) -> Tensor:
    """Rows by their numbers."""
    return f.new(dims, x.dtype, "index", f.record(_indexed_backward, (x,), x.dims))


def _indexed_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "index_put")


def every_token(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dropout, scores of every token, their loss in fp32. Older classes call their layer `classifier`."""
    f = model.tape
    f.module = "dropout"
    x = ops.dropout(f, x, model.arch.dropout.classifier)
    logits = model.linear("score" if model.has("score") else "classifier", x)
    f.module = ""
    loss = plain_cross_entropy(f, f.to(logits, "fp32"))
    model.kept.clear()  # `TokenClassifierOutput` has no cache
    return loss, logits
