"""The accelerator that DeepSpeed finds in a trace: cards with streams and endless memory, whose tensors are on the fake CPU.

Without one DeepSpeed takes the CPU for a device that runs in step with the host, and does without streams.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch

from peftplan.trace.events.tracker import Tracker
from peftplan.trace.load import EMPTIED

ENDLESS = 2**50
ASKING = ("partition_parameters", "partitioned_param_coordinator", "stage3", "utils")
"""Modules that ask other ranks whether they agree (`assert_ints_same_as_other_ranks`)."""


class Event(torch.cpu.Event):
    """An event that has happened."""

    def __init__(self, **options: Any) -> None:
        super().__init__()


@contextmanager
def on_fake_cards(tracker: Tracker) -> Iterator[None]:
    """Let DeepSpeed run on fake cards, and leave it as it was found."""
    with ExitStack() as circumstances:
        circumstances.enter_context(patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}))
        circumstances.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        circumstances.enter_context(patch.object(logging.getLogger("DeepSpeed"), "disabled", True))
        import_module("deepspeed")
        real: Any = sys.modules["deepspeed.accelerator.real_accelerator"]
        circumstances.enter_context(patch.object(real, "ds_accelerator", _cards(tracker)))
        for name in ASKING:
            module = import_module(f"deepspeed.runtime.zero.{name}")
            circumstances.enter_context(patch.object(module, "assert_ints_same_as_other_ranks", lambda *ints: None))
            if hasattr(module, "defragment"):
                circumstances.enter_context(patch.object(module, "defragment", _through_host(module.defragment, tracker)))
        import_module("deepspeed.comm.torch")
        circumstances.enter_context(patch.object(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None))
        circumstances.enter_context(patch.object(torch.Tensor, "record_stream", lambda *stream: None))
        circumstances.enter_context(patch.object(torch.cpu.Stream, "synchronize", lambda stream: None, create=True))
        # ZeRO-3 puts its own there for good (runtime/zero/partition_parameters.py, `zero3_linear_wrap`)
        circumstances.enter_context(patch.object(torch.nn.functional, "linear", torch.nn.functional.linear))
        for name in ("deepspeed.comm.comm", "deepspeed.utils.groups"):
            circumstances.enter_context(_restored(import_module(name)))
        yield


def _through_host(defragment: Callable[..., torch.Tensor], tracker: Tracker) -> Callable[..., torch.Tensor]:
    """`defragment`, which frees tensors that it has copied to the host, and then brings them back in one piece.

    On the CPU both buffers are one, which is allocated first.
    """

    def defragmented(tensors: Any) -> torch.Tensor:
        with tracker.paused():
            flat = defragment(tensors)
        tracker.register(flat, "weights", "flat weights")
        return flat

    return defragmented


@contextmanager
def _restored(module: Any) -> Iterator[None]:
    """Put the globals of a module back: process groups that are gone."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def _cards(tracker: Tracker) -> Any:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator  # type: ignore[import-not-found]

    class Cards(CPU_Accelerator):  # type: ignore[misc]
        """CUDA's answers."""

        Stream = torch.cpu.Stream
        Event = Event

        def __init__(self) -> None:
            super().__init__()
            self._communication_backend_name = "fake"

        def is_synchronized_device(self) -> bool:
            return False

        def stream(self, stream: Any) -> Any:
            return torch.cpu.stream(stream)

        def current_stream(self, device_index: Any = None) -> Any:
            return torch.cpu.current_stream()

        def default_stream(self, device_index: Any = None) -> Any:
            return torch.cpu._default_cpu_stream

        def is_fp16_supported(self) -> bool:
            return True

        def current_device(self) -> int:
            return 0

        def device_count(self) -> int:
            return 1

        def available_memory(self, device_index: Any = None) -> int:
            return ENDLESS

        def total_memory(self, device_index: Any = None) -> int:
            return ENDLESS

        def memory_allocated(self, device_index: Any = None) -> int:
            return 0

        def max_memory_allocated(self, device_index: Any = None) -> int:
            return 0

        def empty_cache(self) -> None:
            note = tracker.passing(nbytes=0, shape=(), dtype="uint8", op=EMPTIED)
            note.name = EMPTIED  # of no layer
            tracker.end(note)

        def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
            return tensor

    return Cards()
