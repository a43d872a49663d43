"""The model of a rank of ZeRO-1 or ZeRO-2, played from its log: DeepSpeed's own engine meets every gradient of the whole depth,
and no layer runs.

DeepSpeed's buckets are full at another place in each layer, and a rank keeps the gradients of some layers only, so its log does
not repeat. The model's own does: these stages run it as one GPU does, and see each gradient when it is complete. So the model
is traced alone, from two small depths (`ModelAlone`). The log of all layers is then played (`Player`): where a gradient
arrived, the parameter gets one, and DeepSpeed's hooks run.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftplan.depth.log import Moment, Storage
from peftplan.dtypes import ITEMSIZE
from peftplan.job.setup import Setup
from peftplan.libraries.quantized import TORCH_DTYPES
from peftplan.storage import QuantConfig
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.load import load
from peftplan.trace.model import Built
from peftplan.trace.ranks.one_gpu import OneGpu
from peftplan.trace.ranks.tp import PartTracker

if TYPE_CHECKING:
    from peftplan.trace.result import Traced

ARRIVED = "gradient arrived"
"""The operation of a note in the log, named after the parameter. What is freed behind it is the gradient."""
LOSS = "loss of the model alone"
"""The name of the loss."""
ENDED = "backward ended"
"""The operation of a note in the log. What is freed behind it was held by the loss."""


class ModelAlone(OneGpu):
    """The model as DeepSpeed's engine calls it, on a rank that does nothing with gradients."""

    tracker = PartTracker
    alone = False

    def prepared(self, built: Built, setup: Setup) -> Setup:
        """The setup of the step: the weights are cast, and there is no autocast."""
        return setup.model_copy(update={"autocast": "none"})

    def load(self, built: Built, tracker: Tracker, setup: Setup, quant: QuantConfig | None) -> None:
        """Load the model in the dtype to which DeepSpeed casts its parameters, and note each gradient when it is complete.

        Source: deepspeed, runtime/engine.py (`_cast_module_mixed_precision`).
        """
        with tracker.paused():
            for parameter in built.model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(TORCH_DTYPES[setup.dtype])
        load(built, tracker, setup.model_copy(update={"adapter_dtype": setup.dtype}), quant)
        for name, parameter in built.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(_note, tracker, name))

    def stepping(self, built: Built, tracker: Tracker, setup: Setup) -> NoSteps:
        """What stands for the optimizer in the loop."""
        return NoSteps(tracker)


def _note(tracker: Tracker, name: str, parameter: torch.Tensor) -> None:
    note = tracker.passing(nbytes=0, shape=(), dtype="uint8", op=ARRIVED)
    note.name = name
    tracker.end(note)
    parameter.grad = None


@dataclass
class NoSteps:
    """A backward, and no step behind it."""

    tracker: Tracker

    def backward(self, loss: torch.Tensor) -> None:
        """Run backward. The gradient that it starts with is the engine's."""
        self.tracker.register(loss, "temporaries", LOSS)
        with self.tracker.paused():
            ones = torch.ones_like(loss)
        self.tracker.on_host(ones)
        loss.backward(ones)  # type: ignore[no-untyped-call]
        self.tracker.end(self.tracker.passing(nbytes=0, shape=(), dtype="uint8", op=ENDED))

    def step(self) -> None:
        """Begin what would be a step."""
        self.tracker.begin("step")

    def zero_grad(self, *, set_to_none: bool) -> None:
        """Nothing is left."""

    def after_step(self) -> None:
        """Nothing has stepped."""


@dataclass
class Player:
    """Plays the log of a model in its place."""

    traced: Traced
    tracker: Tracker
    model: nn.Module
    _windows: Iterator[Iterator[Moment]] = field(init=False)
    _named: dict[str, nn.Parameter] = field(init=False)
    _arriving: dict[int, nn.Parameter] = field(init=False)
    """Number of a storage that is a gradient → its parameter."""
    _tensors: dict[int, torch.Tensor] = field(default_factory=dict, init=False)
    """Number of a storage → the tensor that stands for it: gradients that have not arrived, and the loss."""
    _storages: dict[int, Storage] = field(default_factory=dict, init=False)
    """Number of a storage → the one in the new log."""

    def __post_init__(self) -> None:
        starts = [*(start for start, _ in self.traced.began), len(self.traced.log)]
        self._windows = (
            iter(self.traced.log[start:end])
            for (start, phase), end in zip(self.traced.began, starts[1:], strict=True)
            if phase in ("forward", "backward")
        )
        self._named = dict(self.model.named_parameters())
        self._arriving = {gradient.id: self._named[str(note.name)] for note, gradient in arrivals(self.traced.log)}

    def forward(self, **batch: Any) -> dict[str, torch.Tensor]:
        """What the model does when it is called."""
        with self.tracker.paused():
            leaf = torch.zeros((), device=next(iter(self._named.values())).device, requires_grad=True)
        loss: torch.Tensor = _Played.apply(leaf, self)  # type: ignore[no-untyped-call]
        return {"loss": loss}

    def forwards(self) -> torch.Tensor:
        """Play the next forward. Returns the loss."""
        loss = self.play(next(self._windows))
        assert loss is not None
        return loss

    def backwards(self) -> Iterator[Moment]:
        """Play the next backward. Returns what follows when the loss is freed."""
        moments = next(self._windows)
        self.play(moments)
        return moments

    def play(self, moments: Iterator[Moment]) -> torch.Tensor | None:
        """Play these moments up to the end of a backward. Returns the loss if it is among them."""
        loss, arrived = None, None
        for kind, storage, _, module in moments:
            if storage.op == ENDED and kind == "alloc":  # frees that follow each other are in the order of the layers
                break
            if storage.op == ARRIVED:
                arrived = self._named[str(storage.name)] if kind == "alloc" else arrived
            elif kind == "alloc" and storage.id in self._arriving:
                self._tensors[storage.id] = self._tensor(storage, self._arriving[storage.id].shape, module)
            elif kind == "alloc" and storage.name == LOSS:
                loss = self._tensor(storage, storage.shape, module)
            elif kind == "alloc" and storage.op != "batch":
                self._storages[storage.id] = replace(storage, id=self.tracker._count)
                self.tracker._count += 1
                self.tracker.log.append(Moment("alloc", self._storages[storage.id], self.tracker.phase, module))
            elif arrived is not None and kind == "free" and storage.id in self._tensors:
                _accumulate(arrived, self._tensors.pop(storage.id))
                arrived = None
            elif kind == "free" and storage.id in self._storages:
                self.tracker.log.append(Moment("free", self._storages.pop(storage.id), self.tracker.phase, module))
        return loss

    def _tensor(self, storage: Storage, shape: Sequence[int], module: str) -> torch.Tensor:
        """A tensor in the place of a storage."""
        with self.tracker.paused():
            tensor = torch.empty(shape, dtype=TORCH_DTYPES[storage.dtype], device=next(iter(self._named.values())).device)
        self.tracker._stack.append(module)
        with torch._C.DisableTorchFunction():
            self.tracker._add(tensor.untyped_storage(), tensor, op=storage.op)
        self.tracker._stack.pop()
        return tensor


def arrivals(log: Sequence[Moment]) -> Iterator[tuple[Storage, Storage]]:
    """Each note of a gradient, with what is freed behind it."""
    notes = (at for at, (kind, storage, *_) in enumerate(log) if kind == "free" and storage.op == ARRIVED)
    yield from ((log[at].storage, log[at + 1].storage) for at in notes)


def plays(traced: Traced) -> bool:
    """Whether a log can be played: every gradient that arrives is a storage of its own."""
    log = traced.log
    notes = [at for at, (kind, storage, *_) in enumerate(log) if kind == "free" and storage.op == ARRIVED]
    return all(at + 1 < len(log) and log[at + 1].kind == "free" for at in notes) and all(
        gradient.op != ARRIVED and gradient.nbytes == ITEMSIZE[gradient.dtype] * torch.Size(gradient.shape).numel()
        for _, gradient in arrivals(log)
    )


def _accumulate(parameter: nn.Parameter, gradient: torch.Tensor) -> None:
    """What autograd does with a gradient, which it holds until the hooks end (torch, autograd/functions/accumulate_grad.h)."""
    if parameter.grad is None:
        parameter.grad = gradient.detach()
    else:
        parameter.grad += gradient
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        hook(parameter)


class _Played(torch.autograd.Function):
    """A model whose forward and backward are played."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, player: Player) -> torch.Tensor:
        ctx.player = player
        return player.forwards()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        ctx.rest = _Rest()
        weakref.finalize(ctx.rest, ctx.player.play, ctx.player.backwards())
        return None, None


class _Rest:
    """Is freed with the graph that holds it, which the loss holds."""
