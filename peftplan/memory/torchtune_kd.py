"""torchtune's distillation: logits of student and teacher in eight chunks of tokens, their divergence, and the cross entropy.

b rows, s tokens, v vocabulary. Source: torchtune at bd2a0fc7, modules/transformer.py (`chunked_output`),
modules/loss/kd_losses.py (`ForwardKLWithChunkedOutputLoss`), modules/loss/ce_chunked_output_loss.py,
recipes/knowledge_distillation_single_device.py (`_loss_step`).
"""

from __future__ import annotations

from peftplan.memory.torchtune_loss import summed_cross_entropy
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Node, Tensor


def loss_of_chunks(f: Tape, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """The two losses, of which the recipe takes shares. The caller holds all logits until both are made."""
    f.module = ""
    divergence = f.new((), "fp32", "total divergence")
    for mine, theirs in zip(student, teacher, strict=True):
        divergence = ops.add_(f, divergence, _divergence(f, mine, theirs))
    entropy = f.new((), "fp32", "total loss")
    for logits in student:
        entropy = ops.add_(f, entropy, summed_cross_entropy(f, logits))
    return ops.add(f, ops.scale(f, entropy), ops.scale(f, divergence))


def _divergence(f: Tape, student: Tensor, teacher: Tensor) -> Tensor:
    """`ForwardKLLoss.forward`, summed. Its locals live until it returns."""
    dims = student.dims
    wide = f.to(teacher, "fp32")
    probabilities = f.new(dims, "fp32", "softmax")
    del wide
    magnitudes = f.new(dims, student.dtype, "abs")
    infinite = f.new(dims, "bool", "eq")
    del magnitudes
    log_probabilities = ops.keeps_output(f, f.to(student, "fp32"), "log_softmax")
    products = f.new(dims, "fp32", "mul", f.record(_weighed_backward, (log_probabilities,), probabilities))
    filled = f.new(dims, "fp32", "masked_fill", f.record(_filled_backward, (products,), infinite))
    del products
    return ops.summed(f, filled)


def _weighed_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    return f.new(g.dims, "fp32", "mul")


def _filled_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    return f.new(g.dims, "fp32", "masked_fill")
