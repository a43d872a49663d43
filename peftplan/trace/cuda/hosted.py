"""Tensors saved for backward in host memory: they leave the device until backward copies them back.

Source: torch, autograd/graph.py (`save_on_cpu`): pinned memory there, both copies on the stream that computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from peftplan.units import pinned


class Host:
    """How many bytes of pinned host memory hold what waits, now and at most."""

    def __init__(self) -> None:
        self.live = self.most = 0

    def add(self, nbytes: int) -> None:
        """Bytes that come, or that go where negative."""
        self.live += nbytes
        self.most = max(self.most, self.live)


class Hosted:
    """A tensor that waits on the host: what a copy on the device is made from."""

    __slots__ = ("device", "dtype", "host", "nbytes", "size")

    def __init__(self, tensor: torch.Tensor, host: Host) -> None:
        self.size, self.dtype, self.device = tensor.size(), tensor.dtype, tensor.device
        self.nbytes, self.host = pinned(tensor.numel() * tensor.element_size()), host
        host.add(self.nbytes)

    def __del__(self) -> None:
        self.host.add(-self.nbytes)


_HOSTS = [Host()]


@contextmanager
def counted_host() -> Iterator[Host]:
    """Count what waits in host memory from here on."""
    _HOSTS.append(Host())
    try:
        yield _HOSTS[-1]
    finally:
        _HOSTS.pop()


class SavedOnHost(saved_tensors_hooks):
    """`save_on_cpu` for fake tensors: keeps what a copy is made from, and makes it anew whenever it is asked for."""

    def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
        host = _HOSTS[-1]

        def pack(tensor: torch.Tensor) -> Any:
            return Hosted(tensor, host)

        def unpack(packed: Hosted) -> torch.Tensor:
            return torch.empty(packed.size, dtype=packed.dtype, device=packed.device)

        super().__init__(pack, unpack)
