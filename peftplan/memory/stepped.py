"""Optimizers that step each parameter in backward: few gradients wait for others.

Source: torchtune at bd2a0fc7, training/memory.py (`OptimizerInBackward`): a hook on each parameter
(`register_post_accumulate_grad_hook`) steps it and sets its gradient to None; transformers' layer-wise optimizers do the same
(trainer_optimizer.py, `optimizer_hook`). lomo-optim, lomo.py and adalomo.py (`fuse_update`, `fused_backward`): a hook on
each gradient steps the parameter whose gradient came before, and the last one is stepped after backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from peftplan.dtypes import SIXTEEN_BITS
from peftplan.memory.looped_steps import Projected, apollo
from peftplan.memory.optimizer import STATES
from peftplan.memory.units import OneGpu
from peftplan.parameters import Parameter
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Parameter as TapeParameter
from peftplan.tape.tensors import Tensor

Update = Callable[[Tape, TapeParameter], None]


class SteppedInBackward(OneGpu):
    """Frees each gradient when it is complete. The optimizer works in place, but for what `update` allocates. Left out: that the
    first step makes the states of one parameter after the other; those of all are made before the first update."""

    def __init__(self, f: Tape, update: Update | None = None) -> None:
        self.f, self.update = f, update
        self.stepped: set[str] = set()
        f.accumulated = self.step

    def step(self, p: TapeParameter) -> None:
        """Step one parameter."""
        module = self.f.module
        if self.update is not None:
            if not self.stepped:
                self.f.mark(STATES)
            self.f.module = p.name
            self.update(self.f, p)
        self.stepped.add(p.name)
        self.f.module, p.grad = module, None

    def idle(self, families: set[str]) -> set[str]:
        """Those that no gradient has reached."""
        return families - self.stepped

    def groups(self, trained: list[Parameter]) -> Iterable[list[Parameter]]:
        """Nothing is left to step over."""
        yield []


class SteppedByNext(SteppedInBackward):
    """The gradient of the next parameter steps the one before."""

    waiting: TapeParameter | None = None

    def step(self, p: TapeParameter) -> None:
        """A gradient is there: step the parameter before."""
        self.step_waiting()
        self.waiting = p

    def step_waiting(self) -> None:
        """Step the parameter whose gradient came last."""
        p, self.waiting = self.waiting, None
        if p is not None:
            super().step(p)

    def end_backward(self) -> None:
        """Step the last parameter."""
        self.step_waiting()


class SteppedAgain(SteppedByNext):
    """Under DDP the end of backward makes the gradients that were freed anew, copies of its buckets (torch, reducer.cpp,
    `copy_bucket_to_grad`), and after backward all parameters are stepped a second time."""

    every_layer = True

    def __init__(self, f: Tape, update: Update, families: Iterable[Parameter]) -> None:
        super().__init__(f, update)
        self.families = [p for p in families if p.trainable]
        self.reduced: list[TapeParameter] = []

    def begin_backward(self, *, syncs: bool) -> None:
        """Backward begins."""
        self.reduced.clear()

    def step(self, p: TapeParameter) -> None:
        """The same, and the bucket has a copy."""
        super().step(p)
        self.reduced.append(p)

    def end_backward(self) -> None:
        """Copy all gradients back, and step all parameters."""
        self.waiting = None
        for p in self.reduced:
            if p.grad is None:
                p.grad = self.f.new(p.dims, p.dtype, f"{p.name}.grad")
        for p in self._in_order():
            SteppedInBackward.step(self, p)

    def _in_order(self) -> Iterable[TapeParameter]:
        """The parameters as the model names them; gradients of the last layer came first."""
        layered = [number for number, p in enumerate(self.families) if p.layers is not None]
        places = {p.name: (layered[0] if p.layers is not None else n, n) for n, p in enumerate(self.families)}
        seen: Counter[str] = Counter()
        keyed = []
        for p in reversed(self.reduced):
            first, own = places[p.name]
            keyed.append(((first, seen[p.name], own), p))
            seen[p.name] += 1
        return (p for _, p in sorted(keyed, key=lambda each: each[0]))


def lomo(f: Tape, p: TapeParameter) -> None:
    """`Lomo.fuse_update`: gradient and parameter in fp32, of which those in fp32 are themselves."""
    assert p.grad is not None
    gradient = f.to(p.grad, "fp32")
    p.grad = None
    wide = _widened(f, p)
    del gradient, wide


def adalomo(f: Tape, p: TapeParameter) -> None:
    """`AdaLomo.fuse_update`, with the second moment of a matrix as two vectors."""
    assert p.grad is not None
    gradient = f.to(p.grad, "fp32")
    p.grad = None
    square = f.new(p.dims, "fp32", "pow")
    update = f.new(p.dims, "fp32", "add")
    del square
    if len(p.dims) > 1:
        mean = f.new(p.dims[:-1], "fp32", "mean")
        del mean
        mean = f.column_sum(p.dims, p.dims[1:], "fp32")
        del mean
        rows = f.new(p.dims[:-1], "fp32", "div")
        columns = f.new(p.dims[1:], "fp32", "rsqrt")
        update = f.new(p.dims, "fp32", "mul")
        del rows, columns
    else:
        update = f.new(p.dims, "fp32", "rsqrt")
    wide = _widened(f, p)
    del gradient, update, wide


def _widened(f: Tape, p: TapeParameter) -> Tensor | None:
    return f.new(p.dims, "fp32", "to") if p.dtype in SIXTEEN_BITS else None


UPDATES: dict[str, Update] = {"lomo": lomo, "adalomo": adalomo}
"""Name of the optimizer → its update of the parameter before, in the hook of a gradient."""


def stepping_in_backward(f: Tape, optim: str, projected: Mapping[str, Projected]) -> SteppedInBackward:
    """The units of an optimizer that steps in backward; `projected`: what APOLLO projects, by name."""
    if optim in UPDATES:
        return SteppedByNext(f, UPDATES[optim])
    if optim == "apollo_adamw_layerwise":
        return SteppedInBackward(f, lambda tape, p: apollo(tape, [(p.name, p.dims, p.dtype)], projected))
    return SteppedInBackward(f)
