"""DDP: torch's own `DistributedDataParallel` and reducer, over the fake process group.

Its buckets and the flat tensors in which it sends the weights do not repeat with the layers. So they are left out of the log,
which has notes in their place (`buckets`). All else that it does, such as gradients that become views of buckets, happens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._C._distributed_c10d import GradBucket, Reducer
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from peftplan.depth.log import Moment
from peftplan.distributed.ddp import bucket_caps
from peftplan.dtypes import parse_dtype
from peftplan.job.setup import Setup
from peftplan.storage import QuantConfig
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.model import Built
from peftplan.trace.ranks.buckets import BUILT, READY, REBUILT, REDUCED, SENT, with_flats
from peftplan.trace.ranks.group import OneOfSeveral
from peftplan.trace.steps import prepared

OF_DDP = "torch.nn.parallel.distributed"
OPTIONS = ("gradient_as_bucket_view", "find_unused_parameters", "static_graph")


class ReducedTracker(Tracker):  # type: ignore[no-untyped-call]
    """A tracker that leaves out what the reducer allocates, and notes the gradients that it copies into its buckets."""

    _reducing = False
    _noting = True

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave new storages out of the log, but know them."""
        self._reducing = True
        try:
            yield
        finally:
            self._reducing = False

    def note(self, what: str, tensor: torch.Tensor, *, name: str = "") -> None:
        """Write a note of a tensor."""
        noted = self.passing(nbytes=tensor.nbytes, shape=tuple(tensor.shape), dtype=parse_dtype(tensor.dtype), op=what)
        noted.name = name
        self.end(noted)

    def rebuilt(self) -> None:
        """Note that the buckets follow the order of the gradients from here on."""
        self._noting = False
        self.note(REBUILT, torch.empty(0, device="meta"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what is copied into a bucket; not the map of the parameters that were used, which is copied too."""
        copies = self._noting and func is torch.ops.aten.copy_.default and args[1].is_floating_point()
        if copies and self._is_left_out(args[0]):
            self.note(READY, args[1])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _is_left_out(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            known = self._live.get(tensor.untyped_storage()._cdata)
        return known is not None and known.empty

    def _see(self, tensor: torch.Tensor, func: Any, source: Any) -> None:
        with torch._C.DisableTorchFunction():
            new = self._reducing and tensor.untyped_storage()._cdata not in self._live
        if new:
            self.on_host(tensor)
        else:
            super()._see(tensor, func, source)


class _RealNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes tensors of numbers that the reducer writes and reads itself real ones: the order of its buckets."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run outside all modes what makes or takes them."""
        kwargs = kwargs or {}
        if kwargs.get("dtype") is not torch.int32 and not any(
            isinstance(a, torch.Tensor) and a.dtype is torch.int32 for a in args
        ):
            return func(*args, **kwargs)
        with _disable_current_modes():
            return func(*args, **kwargs)


@dataclass
class Ddp(OneOfSeveral):
    """A rank that holds all that one GPU holds, and buckets of its gradients."""

    tracker = ReducedTracker
    prepares = True
    whole = True
    _wrapped: DistributedDataParallel = field(init=False)

    @property
    def more_steps(self) -> int:
        """Its second step divides the bucket of the first; with a static graph, whose order the second shows, its third."""
        return 2 if self.distributed.static_graph else 1

    @contextmanager
    def started(self, tracker: Tracker) -> Iterator[None]:
        """Let no other rank be asked for its shapes, and note when buckets are made anew."""
        assert isinstance(tracker, ReducedTracker)
        rebuild = Reducer._rebuild_buckets

        def rebuilding(reducer: Reducer) -> bool:
            with tracker.left_out(), _RealNumbers():  # type: ignore[no-untyped-call]
                rebuilt = rebuild(reducer)
            if rebuilt:
                tracker.rebuilt()
            return rebuilt

        with (
            patch.object(Reducer, rebuild.__name__, rebuilding),
            patch(f"{OF_DDP}._verify_param_shape_across_processes", lambda *args, **kwargs: None),
        ):
            yield

    def load(self, built: Built, tracker: Tracker, setup: Setup, quant: QuantConfig | None) -> None:
        """Load the model as on one GPU, then let DDP send it and make its buckets."""
        assert isinstance(tracker, ReducedTracker)
        super().load(built, tracker, setup, quant)
        for name, tensor in (*built.model.named_parameters(), *built.model.named_buffers()):
            tracker.note(SENT, tensor, name=name)
        for name, parameter in built.model.named_parameters():
            if parameter.requires_grad:
                tracker.note(REDUCED, parameter, name=name)
        tracker.note(BUILT, torch.empty(0, device="meta"))
        built.model.forward = prepared(built.model, setup)
        options: Any = {name: bool(getattr(self.distributed, name)) for name in OPTIONS}
        first, later = bucket_caps(self.distributed)
        cap = later / 2**20 if first == later else None
        with tracker.left_out():
            self._wrapped = DistributedDataParallel(built.model, bucket_cap_mb=cap, **options)
        self._wrapped.register_comm_hook(
            None, lambda state, bucket: _as_it_is(bucket)
        )  # torch refuses other annotations than its own

    def called(self, built: Built) -> nn.Module:
        """The model as DDP wraps it."""
        return self._wrapped

    def batches(self, built: Built) -> Callable[[bool], None]:
        """What is called before each micro batch: only the last one of a step reduces gradients (`Accelerator.no_sync`)."""

        def begin(last: bool) -> None:
            self._wrapped.require_backward_grad_sync = last or bool(self.distributed.sync_each_batch)

        return begin

    def complete(self, log: Sequence[Moment], began: Sequence[tuple[int, str]]) -> tuple[list[Moment], list[tuple[int, str]]]:
        """The log of the whole depth with the flat tensors."""
        later = bucket_caps(self.distributed)
        first = later if self.distributed.find_unused_parameters and not self.distributed.static_graph else (sys.maxsize,)
        return with_flats(log, began, first=first, later=later)


def _as_it_is(bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The bucket as it is: the fake process group does not return it."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
