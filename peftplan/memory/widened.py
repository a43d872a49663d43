"""An optimizer that steps copies of the weights in fp32, with gradients in fp32. Source: badam 1.4, block_optim.py."""

from __future__ import annotations

from peftplan.memory.model import Model
from peftplan.tape.tensors import Tensor


def widened_gradients(model: Model) -> list[Tensor]:
    """`BlockOptimizer._grad_to_hp`: gradients in fp32, each in place of the parameter's own, in the model's order."""
    widened = []
    for family in (p for p in model.parameters.all if p.trainable):
        for p in model.used(family.name):
            if p.grad is None:
                continue
            widened.append(model.tape.new(p.grad.dims, "fp32", "float"))
            model.tape.category[widened[-1].storage.number] = "gradients"  # type: ignore[union-attr]
            p.grad = None
    return widened
