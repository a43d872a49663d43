"""What lets a log of ZeRO-3 repeat with the layers.

What DeepSpeed does for one parameter after the other outside of the model belongs to the parameter's layer.

What it sends of gradients does not repeat: a bucket is full at another place in each layer. So a log has a note of each gradient
that is copied into the bucket, and of each end of a backward. The flat tensors in which gradients are reduced are made from the
notes of the whole depth. Source: deepspeed, runtime/zero/stage3.py (`reduce_independent_p_g_buckets_and_remove_grads`),
runtime/comm/coalesced_collectives.py (`reduce_scatter_coalesced`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from peftplan.depth.log import Moment, Storage
from peftplan.dtypes import ITEMSIZE, parse_dtype
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.ranks.tp import PartTracker
from peftplan.units import ceil_div

ADDED, ENDED = "zero3: gradient added", "zero3: backward ended"
"""Notes in a log; the shape of the first is that of the gradient."""
ENGINE = "DeepSpeed"
"""The module of what belongs to no parameter."""
METHODS = (
    "_DeepSpeedZeroOptimizer_Stage3__add_grad_to_ipg_bucket",
    "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads",
    "independent_gradient_partition_epilogue",
)
"""What adds a gradient to the bucket, what sends it, and what ends a backward."""


class OwnedTracker(PartTracker):  # type: ignore[no-untyped-call]
    """A tracker that knows which parameter DeepSpeed is at, outside of the model."""

    of = ""
    """What stands for the module that runs where none does: the name of a parameter, or `ENGINE`."""

    @property
    def module(self) -> str:
        """The module that is running, or the parameter that DeepSpeed is at."""
        return super().module or self.of

    def _see(self, tensor: torch.Tensor, func: Any, source: Any) -> None:
        """Leave out what has no bytes: DeepSpeed's stand-ins for weights that are divided."""
        with torch._C.DisableTorchFunction():
            new = not tensor.numel() and not self._paused and tensor.untyped_storage()._cdata not in self._live
        if new and not tensor.untyped_storage().nbytes():
            self.on_host(tensor)
        else:
            super()._see(tensor, func, source)

    def end(self, record: Storage) -> None:
        """A free belongs to what made the storage."""
        of, self.of = self.of, ""
        super().end(record)
        self.of = of

    @cached_property
    def names(self) -> dict[int, str]:
        """Identity of a parameter → its name."""
        return {}

    def told(self, items: Sequence[Any], parameters: Sequence[nn.Parameter]) -> list[Any]:
        """The items, each of which belongs to a parameter, in a list whose loops tell of it."""
        return _Told(items, [self.names.get(id(parameter), "") for parameter in parameters], self)


class _InOrder(set[Any]):
    """A set whose loops go by number, where DeepSpeed's go by address: what ends together then is freed in one order."""

    def __iter__(self) -> Iterator[Any]:
        """Loop over parameters, or over their numbers."""
        return iter(sorted(super().__iter__(), key=lambda item: getattr(item, "ds_id", item)))


class _Told(list[Any]):
    """A list whose loops tell a tracker which parameter an item belongs to."""

    def __init__(self, items: Sequence[Any], names: Sequence[str], tracker: OwnedTracker) -> None:
        super().__init__(items)
        self._names, self._tracker = names, tracker

    def __iter__(self) -> Iterator[Any]:
        """Tell of each item, and then what was there before."""
        before = self._tracker.of
        for item, name in zip(super().__iter__(), self._names, strict=True):
            self._tracker.of = name
            yield item
        self._tracker.of = before


@contextmanager
def owned(tracker: OwnedTracker) -> Iterator[None]:
    """Let what is done for each parameter belong to it: norms of gradients, and what gathers and divides outside of the model."""
    from deepspeed.runtime.zero.partition_parameters import Init  # type: ignore[import-not-found]
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3  # type: ignore[import-not-found]

    sums = Stage3.get_grad_norm_direct

    def telling(name: str) -> Any:
        function = getattr(Init, name)

        def told(init: Any, parameters: Sequence[nn.Parameter], *more: Any, **options: Any) -> Any:
            return function(init, tracker.told(parameters, parameters), *more, **options)

        return patch.object(Init, name, told)

    def summing(zero: Any, gradients: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter], *more: Any) -> Any:
        return sums(zero, tracker.told(gradients, parameters), parameters, *more)

    with ExitStack() as patches:
        for name in ("partitioned_param_coordinator", "parameter_offload"):
            patches.enter_context(patch.object(import_module(f"deepspeed.runtime.zero.{name}"), "set", _InOrder, create=True))
        for name in ("_allgather_params_coalesced", "_allgather_params_sequential", "_partition"):
            patches.enter_context(telling(name))
        patches.enter_context(patch.object(Stage3, "get_grad_norm_direct", summing))
        yield


@contextmanager
def noted(tracker: Tracker) -> Iterator[None]:
    """Note in the log what is added to buckets, and leave out what is sent."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    adds, sends, ends = (getattr(Stage3, name) for name in METHODS)

    def note(zero: Any, op: str, shape: tuple[int, ...], dtype: str) -> None:
        with torch.cpu.stream(zero.reduce_and_partition_stream):
            record = tracker.passing(nbytes=0, shape=shape, dtype=dtype, op=op)
            record.stream = tracker.stream()
        tracker.end(record)

    def adding(zero: Any, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        bucket = zero.ipg_buckets[zero.get_param_comm_dtype(parameter)]
        note(zero, ADDED, tuple(parameter.grad.shape), parse_dtype(bucket.buffer.dtype))
        adds(zero, parameter)

    def sending(zero: Any, dtype: torch.dtype) -> None:
        with tracker.paused():
            sends(zero, dtype)

    def ending(zero: Any) -> None:
        note(zero, ENDED, (), "uint8")
        ends(zero)

    with ExitStack() as patches:
        for name, noting in zip(METHODS, (adding, sending, ending), strict=True):
            patches.enter_context(patch.object(Stage3, name, noting))
        yield


@dataclass
class _Sent:
    """The log with what is sent in place of its notes."""

    bucket: int
    world_size: int
    log: list[Moment] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    number: int = 0

    def note(self, moment: Moment) -> None:
        """Take a note, and send the bucket if it is full or backward has ended."""
        numel = _numel(moment.storage)
        if moment.storage.op == ENDED or sum(self.waiting) + numel > self.bucket:
            self.send(moment)
        if moment.storage.op == ADDED:
            self.waiting.append(numel)
            self.dtype = moment.storage.dtype

    def send(self, at: Moment) -> None:
        """A flat tensor of all gradients, and what fills the parts of the last ranks. One gradient that needs neither is sent as
        it is.
        """
        numels, self.waiting = self.waiting, []
        parts = [ceil_div(numel, self.world_size) for numel in numels]
        padded = [
            part - min(part, max(0, numel - rank * part))
            for rank in range(self.world_size)
            for numel, part in zip(numels, parts, strict=True)
        ]
        if not numels or (len(numels) == 1 and not any(padded)):
            return
        sizes = [*(n for n in padded if n), sum(parts) * self.world_size]
        allocated = [self._flat(at, numel) for numel in sizes]
        self.log += [Moment("alloc", flat, at.phase, at.module) for flat in allocated]
        self.log += [Moment("free", flat, at.phase, at.module) for flat in allocated]

    def _flat(self, at: Moment, numel: int) -> Storage:
        self.number += 1
        nbytes = ITEMSIZE[self.dtype] * numel
        return replace(
            at.storage, id=-self.number, nbytes=nbytes, shape=(numel,), dtype=self.dtype, op="reduce_scatter",
            category="communication", freed_segment=at.storage.segment,
        )  # fmt: skip


def _numel(gradient: Storage) -> int:
    return torch.Size(gradient.shape).numel()


def with_sent(
    log: Sequence[Moment], began: Sequence[tuple[int, str]], *, bucket: int, world_size: int
) -> tuple[list[Moment], list[tuple[int, str]]]:
    """The log with what is sent in place of its notes, and where its phases begin then. `bucket`: elements."""
    sent, places = _Sent(bucket, world_size), []
    for moment in log:
        places.append(len(sent.log))
        if moment.storage.op not in (ADDED, ENDED):
            sent.log.append(moment)
        elif moment.kind == "alloc":
            sent.note(moment)
    places.append(len(sent.log))
    return sent.log, [(places[start], phase) for start, phase in began]
