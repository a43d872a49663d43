"""`device_map="auto"`: one process whose modules are on several GPUs, by transformers' own map and accelerate's own hooks.

The first GPU is the fake `cpu`, the others are `cpu:1` and so on, which fake tensors and autograd keep apart. Hooks are attached
before peft adapts the model, as `from_pretrained` does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from accelerate import dispatch_model  # type: ignore[import-untyped]
from transformers.integrations.accelerate import _get_device_map

from peftplan.depth.log import Storage
from peftplan.depth.shallow import Stack
from peftplan.distributed.strategy import Distributed
from peftplan.errors import RefusedError
from peftplan.job.setup import Setup
from peftplan.storage import QuantConfig
from peftplan.trace.by_device import by_device
from peftplan.trace.events.tracker import Tracker
from peftplan.trace.load import load_on_devices
from peftplan.trace.model import Built
from peftplan.trace.ranks.one_gpu import OneGpu

if TYPE_CHECKING:
    from peftplan.trace.result import Traced

ROOM = 10 * 2**40
"""Bytes of a GPU that is never full: the map balances the modules, and no module goes to the host."""
MOVES = "accelerate.hooks.set_module_tensor_to_device"
"""What moves a tensor when a hook is attached; `from_pretrained` has loaded each to its place."""
MAPS = "accelerate.utils.modeling"
FIRST = torch.device("cpu")


def fake_gpu(number: int) -> torch.device:
    """The fake device of a GPU. Tensors of the batch are real ones on `cpu`."""
    return torch.device("cpu", number) if number else FIRST


class DeviceTracker(Tracker):  # type: ignore[no-untyped-call]
    """A tracker that knows the GPU of each storage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.device_of: dict[int, int] = {}
        """Number of a storage → its GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation on the GPU of its first tensor."""
        first = args[0] if args else None
        if isinstance(first, (list, tuple)) and first:
            first = first[0]
        if isinstance(first, torch.Tensor):
            self.device = _gpu(first)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, storage: torch.UntypedStorage, tensor: torch.Tensor, *, op: str) -> Storage:
        record = super()._add(storage, tensor, op=op)
        self.device_of[record.id] = _gpu(tensor)
        return record

    def passing(self, **facts: Any) -> Storage:
        """Record an allocation that no tensor shows, on the GPU of the operation that makes it."""
        record = super().passing(**facts)
        self.device_of[record.id] = self.device
        return record


def _gpu(tensor: torch.Tensor) -> int:
    device = getattr(tensor, "fake_device", FIRST)
    return device.index or 0


class DeviceMap(OneGpu):
    """All GPUs of one process."""

    tracker = DeviceTracker

    def __init__(self, distributed: Distributed) -> None:
        self.devices = distributed.world_size
        self._placed: Mapping[str, int] = {}
        """Names of modules → their GPU."""

    def extended(
        self, stacks: tuple[Stack, ...], config: Mapping[str, Any], setup: Setup, quant: QuantConfig | None
    ) -> tuple[Stack, ...]:
        """None: layers are on different GPUs."""
        return ()

    def divided(self, base: Any) -> None:
        """Place the modules, and attach the hooks that move what they are called with."""
        with patch.object(logging.getLogger(MAPS), "disabled", True):  # it warns of cards that are not there
            self._placed = dict(_get_device_map(base, "balanced", dict.fromkeys(range(self.devices), ROOM), None))
        devices = {name: fake_gpu(number) for name, number in self._placed.items()}
        if (used := len(set(devices.values()))) < self.devices:
            raise RefusedError(
                f"gpus: transformers places this model on {used} of {self.devices} GPUs; accepted: {used}, or engine analytic"
            )
        with patch(MOVES, lambda *args, **kwargs: None):
            dispatch_model(base, devices, main_device=FIRST, skip_keys=base._skip_keys_device_placement)

    def device_of(self, built: Built, on: torch.device) -> Callable[[torch.nn.Module], torch.device]:
        """A module → the GPU of the longest name in the map that it is under; what is under none is on the first one."""

        def place(module: torch.nn.Module) -> torch.device:
            name = built.names.get(id(module), "")
            while name and name not in self._placed:
                name = name.rpartition(".")[0]
            return fake_gpu(self._placed.get(name, 0))

        return place

    def load(self, built: Built, tracker: Tracker, setup: Setup, quant: QuantConfig | None) -> None:
        """Load the model on each GPU."""
        load_on_devices(built, tracker, setup, self.devices)

    def apart(self, traced: Traced) -> Traced:
        """The trace of each GPU."""
        return by_device(traced, self.devices)
