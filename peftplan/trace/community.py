"""Optimizers of small packages, operation by operation: schedulefree and grokadamw. The packages need not be installed.

Source: schedulefree 1.4.1 `{adamw,radam,sgd}_schedulefree.py` (foreach); grokadamw 0.1.2 `grokadamw.py`. Values are not theirs.
RAdamScheduleFree takes its Adam step at once: in a real run it begins after a few steps of plain SGD, which take less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

BETA = 0.9
EPS = 1e-8
MAX_GRAD_NORM = 1.0
"""`gradient_clipping` of grokadamw, per parameter."""

Parameters = Sequence[torch.nn.Parameter]


class Stepped(torch.optim.Optimizer):
    """An optimizer without options."""

    def __init__(self, params: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step over the parameters with gradients."""
        self.update([p for group in self.param_groups for p in group["params"] if p.grad is not None])

    def update(self, params: Parameters) -> None:
        """The step, as the package runs it."""
        raise NotImplementedError


class ScheduleFree(Stepped):
    """`AdamWScheduleFree` and `RAdamScheduleFree`: the base point and one moment; a step copies all parameters temporarily."""

    def update(self, params: Parameters) -> None:
        """The foreach branch."""
        for p in params:
            if "z" not in self.state[p]:
                self.state[p]["z"] = torch.clone(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        gradients = [p.grad for p in params if p.grad is not None]
        moments = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_mul_(moments, BETA)
        torch._foreach_addcmul_(moments, gradients, gradients, value=1 - BETA)
        denominators = torch._foreach_div(moments, BETA)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, EPS)
        torch._foreach_div_(gradients, denominators)
        self.average(params, gradients)

    def average(self, params: Parameters, gradients: list[torch.Tensor]) -> None:
        """The base point and the average of it, in place."""
        points = [self.state[p]["z"] for p in params]
        torch._foreach_lerp_(list(params), points, weight=BETA)
        torch._foreach_add_(list(params), gradients, alpha=BETA)
        torch._foreach_sub_(points, gradients, alpha=BETA)


class ScheduleFreeSGD(ScheduleFree):
    """`SGDScheduleFree`: the base point, and no temporaries."""

    def update(self, params: Parameters) -> None:
        """The foreach branch."""
        for p in params:
            if "z" not in self.state[p]:
                self.state[p]["z"] = torch.clone(p)
        self.average(params, [p.grad for p in params if p.grad is not None])


class GrokAdamW(Stepped):
    """`GrokAdamW`: its three averages are in host memory. A step copies those of one parameter at a time to the device."""

    def update(self, params: Parameters) -> None:
        """`_update_group`, with an empty tensor in place of each copy from the host."""
        for p in params:
            exp_avg, exp_avg_sq = torch.empty_like(p), torch.empty_like(p)
            grok_ema = torch.empty_like(p)
            torch.nn.utils.clip_grad_norm_(p, MAX_GRAD_NORM)
            grad: Any = p.grad
            grok_ema.mul_(BETA).add_(grad, alpha=1 - BETA)
            grok_grad = grad + BETA * grok_ema
            exp_avg.mul_(BETA).add_(grok_grad, alpha=1 - BETA)
            exp_avg_sq.mul_(BETA).addcmul_(grok_grad, grok_grad, value=1 - BETA)
            p.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(EPS), value=-BETA)


CLASSES: dict[str, type[Stepped]] = {
    "schedule_free_adamw": ScheduleFree,
    "schedule_free_radam": ScheduleFree,
    "schedule_free_sgd": ScheduleFreeSGD,
    "grokadamw": GrokAdamW,
}
