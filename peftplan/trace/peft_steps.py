"""Optimizers that a method of peft brings along, used as peft documents them.

AdaLoRA: `model.base_model.update_and_allocate(step)` after `optimizer.step()` and before `zero_grad()`; its sensitivities are
three tensors like each `lora_` parameter. LoRA-FA: `create_lorafa_optimizer`: two states per B, none per A. Source: peft
0.21.2 `tuners/adalora/model.py` (`update_and_allocate`), `optimizers/lorafa.py`. LoRA+ changes learning rates only. Left out:
AdaLoRA's masks, which begin after `tinit` steps and depend on values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftplan.memory.optimizer import LORAFA_REPLACES
from peftplan.trace.events.tracker import Tracker

LORAFA = "peftplan_lorafa"
"""Attribute of a model whose A's are frozen by `create_lorafa_optimizer`."""
SENSITIVITIES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def lorafa_optimizer(model: Any, *, learning_rate: float) -> Any:
    """peft's own LoRA-FA optimizer for the model's active adapter."""
    import peft.optimizers

    config = model.active_peft_config
    return peft.optimizers.create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=learning_rate)


def uses_lorafa(model: nn.Module, optim: str) -> bool:
    """Whether this run's optimizer is LoRA-FA's."""
    return LORAFA in model.__dict__ and optim in LORAFA_REPLACES


def allocator_of(model: Any) -> Any:
    """AdaLoRA's rank allocator, None for other methods."""
    return getattr(getattr(model, "base_model", None), "rankallocator", None)


@dataclass
class WithAllocator:
    """An optimizer and AdaLoRA's allocator after each of its steps."""

    optimizer: Any
    model: Any
    tracker: Tracker
    steps: int = field(default=0)

    @property
    def managed_bytes(self) -> int:
        """The optimizer's."""
        return int(getattr(self.optimizer, "managed_bytes", 0))

    def step(self) -> None:
        """The optimizer's step, then `update_and_allocate`."""
        self.optimizer.step()
        self.steps += 1
        self.model.base_model.update_and_allocate(self.steps)

    def after_step(self) -> None:
        """Name the states and the sensitivities."""
        self.optimizer.after_step()
        for name, tensor in self._sensitivities():
            self.tracker.register(tensor, "optimizer_states", name, op="optimizer")

    def zero_grad(self, *, set_to_none: bool) -> None:
        """The optimizer's own."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def _sensitivities(self) -> Iterator[tuple[str, torch.Tensor]]:
        allocator = allocator_of(self.model)
        for kind in SENSITIVITIES:
            for name, tensor in getattr(allocator, kind).items():
                yield f"base_model.model.{name}.{kind}", tensor
