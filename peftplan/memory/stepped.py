"""An optimizer that steps each parameter in backward: no gradient waits for another.

Source: torchtune at bd2a0fc7, training/memory.py (`OptimizerInBackward`): a hook on each parameter
(`register_post_accumulate_grad_hook`) steps it and sets its gradient to None.
"""

from __future__ import annotations

from collections.abc import Iterable

from peftplan.memory.units import OneGpu
from peftplan.parameters import Parameter
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Parameter as TapeParameter


class SteppedInBackward(OneGpu):
    """Frees each gradient when it is complete. The optimizer works in place."""

    def __init__(self, f: Tape) -> None:
        self.stepped: set[str] = set()
        f.accumulated = self.step

    def step(self, p: TapeParameter) -> None:
        """Step one parameter."""
        self.stepped.add(p.name)
        p.grad = None

    def idle(self, families: set[str]) -> set[str]:
        """Those that no gradient has reached."""
        return families - self.stepped

    def groups(self, trained: list[Parameter]) -> Iterable[list[Parameter]]:
        """Nothing is left to step over."""
        yield []
