"""Optimizers on fake tensors: torch's and transformers' own classes, and stand-ins for those whose kernels need CUDA.

A stand-in makes exactly the states of `peftplan.optim` in its first step and updates them in place, as one kernel per parameter
does; states in managed memory are summed apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from peftplan.dtypes import parse_dtype
from peftplan.errors import RefusedError
from peftplan.job.setup import Setup
from peftplan.ledger import Allocation
from peftplan.optim import BESIDE, Optimizer, parse_optim, parse_optim_args, shared_states, states
from peftplan.optim.torchao import FLUSHED
from peftplan.trace import community
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.meshes import by_mesh
from peftplan.trace.peft_steps import lorafa_optimizer, uses_lorafa
from peftplan.units import round512

LEARNING_RATE = 1e-3
"""Changes no byte."""


class Steps(Protocol):
    """The interface of an optimizer that a step program needs."""

    def step(self) -> None: ...
    def zero_grad(self, *, set_to_none: bool) -> None: ...
    def after_step(self) -> None: ...


Named = list[tuple[str, nn.Parameter]]


def make_optimizer(setup: Setup, model: nn.Module, tracker: Tracker) -> Steps:
    """The optimizer of the setup over the trainable parameters, in the order that Trainer and scripts give them.

    Raises RefusedError for those whose steps no program reproduces (`Optimizer.untraced`).
    """
    optimizer = parse_optim(str(setup.optim))
    arguments = parse_optim_args(setup.optim_args)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if uses_lorafa(model, optimizer.name):
        return Real(lorafa_optimizer(model, learning_rate=LEARNING_RATE), trainable, tracker, host_steps=False)
    if optimizer.untraced:
        raise RefusedError(f"optim: {optimizer.name} cannot be traced: {optimizer.untraced}; leave out --engine trace")
    if optimizer.name in BESIDE:
        raise RefusedError(f"optim: {optimizer.name} cannot be traced; leave out --engine trace")
    if optimizer.step_implementation == "kernel":
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
        in_embedding = {name: setup.by.makes_optimizer and id(p) in embeddings for name, p in trainable}
        return StandIn(optimizer, arguments, trainable, in_embedding, tracker)
    groups = by_mesh(p for _, p in trainable) or [[]]
    one = groups[0] if len(groups) == 1 and groups[0] else None
    real = _torch_optimizer(optimizer.name, one or [{"params": group} for group in groups], arguments)
    return Real(real, trainable, tracker, host_steps=optimizer.step_implementation == "foreach")


def torch_optimizer(setup: Setup, params: list[Any]) -> Any:
    """The optimizer of the setup over parameters or groups of them."""
    return _torch_optimizer(parse_optim(str(setup.optim)).name, params, parse_optim_args(setup.optim_args))


def _torch_optimizer(name: str, params: list[Any], arguments: Mapping[str, str]) -> Any:
    momentum = float(arguments.get("momentum", 0))
    if name in ("adamw_torch", "adamw_torch_fused"):
        fused = name.endswith("fused")
        return torch.optim.AdamW(params, lr=LEARNING_RATE, fused=fused, foreach=not fused)
    if name == "sgd":
        return torch.optim.SGD(params, lr=LEARNING_RATE, momentum=momentum, foreach=True)
    if name == "adagrad":
        return torch.optim.Adagrad(params, lr=LEARNING_RATE, foreach=True)
    if name == "rmsprop":
        centered = arguments.get("centered", "false").lower() in ("true", "1", "yes")
        return torch.optim.RMSprop(params, lr=LEARNING_RATE, momentum=momentum, centered=centered, foreach=True)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(params, lr=LEARNING_RATE, scale_parameter=False, relative_step=False)  # type: ignore[no-untyped-call]
    return community.CLASSES[name](params)


@dataclass
class Real:
    """A real optimizer on fake tensors. `host_steps`: its `step` counters lie on the CPU."""

    optimizer: Any
    named: Named
    tracker: Tracker
    host_steps: bool

    def step(self) -> None:
        """The optimizer's own step."""
        self.optimizer.step()

    def zero_grad(self, *, set_to_none: bool) -> None:
        """The optimizer's own `zero_grad`."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def after_step(self) -> None:
        """Name the states, and remove those in host memory from the log."""
        names: dict[Any, str] = {id(p): name for name, p in self.named}
        host = []
        for p, of_parameter in self.optimizer.state.items():
            for key, value in of_parameter.items():
                if not isinstance(value, torch.Tensor):
                    continue
                if key == "step" and self.host_steps:
                    host.append(value)
                else:
                    self.tracker.register(
                        value, "optimizer_states", f"{p if isinstance(p, str) else names[id(p)]}.{key}", op="optimizer"
                    )
        self.tracker.forget(host)


@dataclass
class StandIn:
    """The states of `peftplan.optim`, created in the first step, and its temporaries."""

    optimizer: Optimizer
    arguments: Mapping[str, str]
    named: Named
    in_embedding: Mapping[str, bool]
    tracker: Tracker
    managed_bytes: int = 0
    _has_states: bool = field(default=False)

    def step(self) -> None:
        """Create the states in the first step; make and free what the kernel of each parameter allocates."""
        if not self._has_states:
            self._make_states()
            if self.optimizer.temporaries is not None:
                torch.empty(FLUSHED, dtype=torch.uint8, device=self.named[0][1].device)
        for _, p in self.named:
            if p.grad is not None and (temporaries := self.optimizer.temporaries) is not None:
                _buffers = [torch.empty(a.nbytes, dtype=torch.uint8, device=p.device) for a in temporaries(tuple(p.shape))]
                del _buffers

    def _make_states(self) -> None:
        self._has_states = True
        every: list[Allocation] = []
        for name, p in self.named:
            if p.grad is None:  # passed over, as bitsandbytes' `Optimizer8bit.step` does
                continue
            of_one = states(
                self.optimizer,
                shape=tuple(p.shape),
                dtype=parse_dtype(p.dtype),
                in_embedding=self.in_embedding[name],
                optim_args=self.arguments,
            )
            every += of_one
            self._take(name, of_one)
        self._take("optimizer", shared_states(self.optimizer, states=every))

    def _take(self, name: str, allocations: Iterable[Allocation]) -> None:
        for a in allocations:
            if a.place == "device":
                state = self.tracker.passing(
                    nbytes=a.nbytes, shape=a.dims, dtype=a.dtype, op="optimizer", category="optimizer_states"
                )
                state.name = f"{name}.{a.name}"
            elif a.place == "managed":
                self.managed_bytes += round512(a.nbytes)

    def zero_grad(self, *, set_to_none: bool) -> None:
        """As `torch.optim.Optimizer.zero_grad`."""
        for _, p in self.named:
            if p.grad is not None and set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()

    def after_step(self) -> None:
        """Does nothing: the states are named when they are created."""
