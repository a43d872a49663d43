"""A value head over the last hidden states, beside the logits and their loss, and a loss of what it gives.

b rows, the first half chosen; s tokens; v vocabulary; h hidden size. Source: trl as LLaMA-Factory pins it,
models/modeling_value_head.py (`AutoModelForCausalLMWithValueHead.forward`); llamafactory 0.9.5, train/rm/trainer.py
(`PairwiseTrainer.compute_loss`). The model's own loss lives until the trainer's is made, and with it the log-probabilities of all
tokens. Left out: a few numbers of each row.
"""

from __future__ import annotations

from peftplan.arch.modules import VALUE_HEAD
from peftplan.memory.heads import causal_lm
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor

DROPOUT = 0.1
"""`summary_dropout_prob`, which configs of decoders do not have."""


def with_values(model: Model, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The model's own loss, logits in fp32, and a value of each token."""
    f = model.tape
    loss, logits = causal_lm(model, x)
    f.module = VALUE_HEAD
    wide = f.to(ops.dropout(f, x, DROPOUT), "fp32")
    values = model.linear(VALUE_HEAD, wide)
    del wide
    f.module = ""
    return loss, f.to(logits.detach(), "fp32"), values


def loss_of_pairs(f: Tape, own: Tensor, logits: Tensor, values: Tensor) -> Tensor:
    """`logsigmoid` of the difference of two values, those of the last tokens. `own`: the model's loss, which nothing reads."""
    f.module = ""
    del logits
    wide = f.to(values, "fp32")
    return f.new((), "fp32", "mean", f.record(_pairs_backward, (wide,), wide.dims))


def _pairs_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], "fp32", "cat")
