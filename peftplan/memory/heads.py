"""From hidden states to a loss: the head of each task, as transformers' model classes have it."""

from __future__ import annotations

from collections.abc import Callable

from peftplan.errors import NeedsTraceError
from peftplan.memory import ops
from peftplan.memory.loss import causal_lm_loss
from peftplan.memory.model import Model
from peftplan.memory.tape import Tensor

Head = Callable[[Model, Tensor], tuple[Tensor, Tensor]]


def causal_lm(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """`…ForCausalLM.forward`: logits of every position, scaled or soft-capped where the class does, and their loss."""
    f = model.tape
    assert model.arch.output_embedding is not None
    logits = model.linear(model.arch.output_embedding, x)
    f.module = ""
    for op in model.arch.logits_ops:
        logits = ops.scale(f, logits, op) if op == "scale" else ops.softcap(f, logits)
    return causal_lm_loss(f, logits), logits


HEADS: dict[str, Head] = {"CAUSAL_LM": causal_lm}
"""Task → head."""


def head_of(model: Model) -> Head:
    """The head of a model's task. Raises NeedsTraceError for tasks that only the trace engine knows."""
    task = model.arch.task_type
    if task not in HEADS:
        raise NeedsTraceError(f"task_type {task} of {model.arch.model_type}: its activations need --engine trace")
    return HEADS[task]
