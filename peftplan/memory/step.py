"""Step programs: the loop around the model decides what is alive when.

Source: transformers 5.24, trainer.py (`training_step`, `compute_loss`); accelerate 1.15, utils/operations.py
(`ConvertOutputsToFp32`). The same programs as `trace.steps` runs.
"""

from __future__ import annotations

from typing import NamedTuple

from peftplan.memory.batch import batch_of
from peftplan.memory.heads import head_of
from peftplan.memory.model import Model
from peftplan.memory.models import forward_of
from peftplan.memory.optimizer import optimizer_step
from peftplan.memory.tape import Tensor
from peftplan.optim import Optimizer


class Program(NamedTuple):
    """What of the setup decides the loop."""

    trainer: str
    keep_outputs: bool
    optimizer: Optimizer


def steady_step(model: Model, program: Program) -> None:
    """One steady optimizer step."""
    f = model.tape
    model.batch = batch_of(model)
    f.mark("forward")
    loss, logits = _forward(model)
    outputs = [logits, *model.outputs]
    del logits
    model.outputs.clear()
    if program.trainer != "plain":
        if f.autocast:
            f.module = ""
            outputs = [f.to(x.detach(), "fp32") for x in outputs]  # accelerate's copies of the outputs
        outputs.clear()
        model.kept.clear()
    elif not program.keep_outputs:
        outputs.clear()
        model.kept.clear()
    f.mark("backward")
    f.backward(loss)
    del loss
    f.mark("step")
    optimizer_step(f, program.optimizer, [p for p in model.parameters.all if p.trainable], clips=program.trainer != "plain")
    del outputs


def _forward(model: Model) -> tuple[Tensor, Tensor]:
    """The loss and the logits."""
    head = head_of(model)
    found = head(model, forward_of(model.arch.model_type)(model))
    model.call_locals.clear()
    model.tape.end_autocast()
    return found
