"""DeepSpeed without ZeRO (stage 0) on the tape: one flat copy of all gradients is reduced, and fp32 masters step.

Source: DeepSpeed 0.19.8, runtime/engine.py (`allreduce_no_retain`, `_configure_fp16_optimizer`) and
runtime/fp16/unfused_optimizer.py (`FP16_UnfusedOptimizer`, around an optimizer that is not DeepSpeed's own). All ranks are alike.

    backward   gradients are copied in flat pieces of more than 500,000,000 elements, all-reduced, and copied back
    step       in 16 bits: an fp32 copy of each gradient, then the step over the masters; a model in fp32 steps itself
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from peftplan.distributed.order import in_module_order, tensors
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.zero import REDUCE_BUCKET, groups_of
from peftplan.dtypes import ITEMSIZE
from peftplan.ledger import Line
from peftplan.memory.load import load_order
from peftplan.memory.loaded import Handle, Memory
from peftplan.memory.model import Model
from peftplan.memory.zero_load import sizes_of
from peftplan.memory.zero_stage import Stage
from peftplan.parameters import Parameter, Parameters
from peftplan.tape.tensors import Tensor


def flat_pieces(parameters: Parameters) -> list[int]:
    """Elements of each flat copy of gradients; a gradient that is a piece of its own is not copied."""
    pieces: list[list[int]] = [[]]
    for p, _ in tensors(in_module_order(parameters)):
        if p.trainable:
            if sum(pieces[-1]) > REDUCE_BUCKET:
                pieces.append([])
            pieces[-1].append(p.numel)
    return [sum(piece) for piece in pieces if len(piece) > 1]


class Zero0(Stage):
    """Gradients of all parameters. `masters`: their fp32 copies by name; empty for a model in fp32."""

    def __init__(self, model: Model, masters: tuple[Parameter, ...], distributed: Distributed, *, dtype: str) -> None:
        super().__init__(model, distributed, dtype=dtype)
        self.pieces = flat_pieces(model.parameters)
        self.trained = [p for p in model.parameters.all if p.trainable]
        self.masters = {p.name: p for p in masters}
        self.wide: list[Tensor] = []
        self.zeros: list[Tensor] = []
        """Gradients of parameters that got none."""

    def idle(self, families: set[str]) -> set[str]:
        """None: a parameter without a gradient gets one of zeros (`_get_gradients_for_reduction`)."""
        return set()

    def end_backward(self) -> None:
        """`buffered_allreduce_fallback`, at a boundary of gradient accumulation."""
        if not self.syncs:
            return
        idle = self.model.idle()
        for p in self.trained:
            if p.name in idle:
                self.zeros.append(self._many(p, p.dtype))
        for numel in self.pieces:
            self._new((numel,), self._dtype, "flat gradients", 0)

    @property
    def _dtype(self) -> str:
        return self.trained[0].dtype if self.trained else self.dtype

    def before_step(self) -> None:
        """Group by group: the norm of each gradient, cast to fp32, then fp32 copies of all of them."""
        for group in groups_of(self.trained) if self.masters else ():
            for p in group:
                self._new((p.numel,), "fp32", "gradient for its norm", 0, "temporaries")
            self.wide += [self._many(p, "fp32") for p in group]

    def _many(self, p: Parameter, dtype: str) -> Tensor:
        self.f.module = ""
        tensor = self.f.many(p.shape, dtype, f"{dtype} gradient of {p.name}", p.copies)
        assert tensor.storage is not None
        self.f.category[tensor.storage.number] = "gradients"
        return tensor

    def groups(self, trained: list[Parameter]) -> Iterator[list[Parameter]]:
        """What the optimizer steps over: each group with weight decay, then without."""
        yield from groups_of(trained)
        self.wide.clear()
        self.zeros.clear()


class WholeLoading(NamedTuple):
    """How a rank loads: the whole model, then an fp32 copy of what trains, and gradients of zeros for the step after it."""

    cast: Parameters
    """In 16 bits; as it is where nothing is cast."""
    masters: bool
    states: tuple[Line, ...]
    """The states of the masters; none where there are none."""

    def __call__(self, memory: Memory[Handle]) -> None:
        """Load tensor by tensor."""
        for p, _ in (tensor for part in load_order(self.cast, by_name=False, moved=True) for tensor in part):
            memory.keep(sizes_of(p))
        if not self.masters:
            return
        stepped = [*self._by_group()]
        for p in stepped:
            clone = memory.allocate(ITEMSIZE[p.dtype] * p.numel)
            memory.keep((ITEMSIZE["fp32"] * p.numel,))
            memory.release(clone)
        for zero in self._zeros(memory, stepped):
            memory.release(zero)

    def first_run(self, memory: Memory[Handle]) -> None:
        """`initialize_optimizer_states`: the optimizer steps as it is made, over gradients of zeros."""
        stepped = [*self._by_group()]
        zeros = self._zeros(memory, stepped)
        for p in stepped:
            memory.keep(tuple(ITEMSIZE[s.dtype] * prod(s.shape) for s in self.states if s.name.rpartition(".")[0] == p.name))
        for zero in zeros:
            memory.release(zero)

    def _zeros(self, memory: Memory[Handle], stepped: list[Parameter]) -> list[Handle]:
        zeros = [memory.allocate(ITEMSIZE[p.dtype] * p.numel) for p in stepped]
        return zeros + [memory.allocate(ITEMSIZE["fp32"] * p.numel) for p in stepped]

    def _by_group(self) -> Iterator[Parameter]:
        """Each trained tensor, in the order of the optimizer's groups."""
        ordered = [p for p, _ in tensors(in_module_order(self.cast))]
        for group in groups_of(self.cast.all):
            names = {p.name for p in group}
            yield from (p for p in ordered if p.name in names)
