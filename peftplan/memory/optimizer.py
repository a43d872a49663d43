"""What the optimizer's step takes for as long as it runs.

Source: torch 2.13, optim/adamw.py, optim/adagrad.py, optim/rmsprop.py (`_multi_tensor_*`), nn/utils/clip_grad.py; transformers
5.24, trainer.py (clipping at 1.0 by default).
"""

from __future__ import annotations

from peftplan.errors import NeedsTraceError, NoEngineError
from peftplan.memory.tape import Tape
from peftplan.memory.tensors import Tensor
from peftplan.optim import Optimizer
from peftplan.parameters import Parameter

FOREACH_COPIES = {"adamw_torch": 1, "sgd": 0, "adagrad": 2, "rmsprop": 1}
"""Copies of all parameters of one dtype that the foreach implementation holds at once."""
IN_PLACE = ("fused", "kernel")


def optimizer_step(f: Tape, optimizer: Optimizer, trained: list[Parameter], *, clips: bool) -> None:
    """Clipping, and then the step. Raises NeedsTraceError for optimizers whose temporaries are not known here, NoEngineError for
    those that no engine knows.
    """
    f.module = ""
    if optimizer.untraced:
        raise NoEngineError(f"optim {optimizer.name}: {optimizer.untraced}")
    if clips:
        _clip(f, trained)
    if optimizer.step_implementation in IN_PLACE:
        return
    copies = FOREACH_COPIES.get(optimizer.name)
    if copies is None:
        raise NeedsTraceError(f"optim {optimizer.name}: what its step takes")
    held: list[Tensor] = []  # the loop's names keep one dtype's until the next one's are made
    for dtype in dict.fromkeys(p.dtype for p in trained):
        held = [
            f.many(p.shape, p.dtype, f"{p.name} {optimizer.name}", copies * p.copies)
            for p in trained
            if copies and p.dtype == dtype
        ]
    del held


def _clip(f: Tape, trained: list[Parameter]) -> None:
    """`clip_grad_norm_`: the norm of each gradient, their stack, and the norm of that."""
    count = sum(p.copies for p in trained)
    norms = f.many((), "fp32", "norm of a gradient", count)
    stack = f.new((count,), "fp32", "stack of norms")
    total = f.new((), "fp32", "total norm")
    del stack, norms, total
