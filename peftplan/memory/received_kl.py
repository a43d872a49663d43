"""NeMo Automodel's distillation where a teacher on other GPUs sends its logits: the cross entropy and their divergence.

b rows, s tokens, v vocabulary; every token is scored. Source: nemo_automodel 0.7.0, recipes/llm/kd.py (`_forward_backward_step`),
recipes/kd_utils.py (`_broadcast_tree`), components/loss/kd_loss.py (`KDLoss.forward`, `_forward_kl_from_log_probs`).
"""

from __future__ import annotations

from peftplan.memory.loss import cross_entropy
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Node, Tensor


def logits_of_teacher(model: Model) -> Tensor:
    """What the teacher sends, in the dtype that it computes in."""
    return model.tape.new(("b", "s", model.arch.vocab_size or 0), "bf16", "teacher's logits")


def of_both(f: Tape, logits: Tensor, sent: Tensor) -> Tensor:
    """The two losses, of which the recipe takes shares."""
    entropy = ops.scale(f, cross_entropy(f, logits), "div")
    divergence = ops.scale(f, _divergence(f, logits, sent), "div")
    return ops.add(f, ops.scale(f, entropy), ops.scale(f, divergence))


def _divergence(f: Tape, logits: Tensor, sent: Tensor) -> Tensor:
    """Scored tokens are picked out of both, which lie in `KDLoss.forward` until it returns, as do their log-probabilities."""
    dims = logits.dims
    mask = f.new(dims[:-1], "bool", "ne")
    picked = f.to(f.new(dims, sent.dtype, "index"), "fp32")
    index = f.new(dims[:-1], "int64", "nonzero")
    narrow = f.new(dims, logits.dtype, "index", f.record(_indexed_backward, (logits,), index))
    own = f.to(narrow, "fp32")
    del narrow
    teacher = f.new(dims, "fp32", "log_softmax")
    student = ops.keeps_output(f, own, "log_softmax")
    out = _forward_kl(f, teacher, student)
    del mask, picked, own
    return out


def _forward_kl(f: Tape, teacher: Tensor, student: Tensor) -> Tensor:
    dims = teacher.dims
    probabilities = f.new(dims, "fp32", "exp")
    ratio = f.new(dims, "fp32", "sub", f.record(_negated, (student,)))
    above = f.new(dims, "bool", "gt")
    zeros = f.new(dims, "fp32", "zeros_like")
    kept = f.new(dims, "fp32", "where", f.record(_where_backward, (ratio,), above))
    del ratio, zeros
    product = f.new(dims, "fp32", "mul", f.record(_scaled, (kept,), probabilities))
    rows = f.new(dims[:-1], "fp32", "sum", f.record(_spread, (product,)))
    del product
    return f.new((), "fp32", "sum", f.record(_handed_on, (rows,)))


def _indexed_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "index backward")


def _negated(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "neg")


def _where_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "where")


def _scaled(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0].dims, g.dtype, "mul")


def _spread(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return g


def _handed_on(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return g
