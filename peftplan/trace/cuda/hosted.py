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
    """Bytes of pinned host memory that saved tensors take, now and at most."""

    def __init__(self) -> None:
        self.live = self.most = 0

    def add(self, nbytes: int) -> None:
        """Add bytes; negative ones are freed."""
        self.live += nbytes
        self.most = max(self.most, self.live)


class Hosted:
    """A tensor saved on the host, from which its copy on the device is made."""

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
    """Count saved tensors in host memory from here on."""
    _HOSTS.append(Host())
    try:
        yield _HOSTS[-1]
    finally:
        _HOSTS.pop()


class SavedOnHost(saved_tensors_hooks):
    """`save_on_cpu` for fake tensors: keeps the source of a copy, and copies again at each use."""

    def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
        host = _HOSTS[-1]

        def pack(tensor: torch.Tensor) -> Any:
            return Hosted(tensor, host)

        def unpack(packed: Hosted) -> torch.Tensor:
            return torch.empty(packed.size, dtype=packed.dtype, device=packed.device)

        super().__init__(pack, unpack)
