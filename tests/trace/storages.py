"""What code takes, storage by storage, on any device: the witness beside the trace engine's own tracker."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SCALARS = 64
"""Storages up to so many bytes are counts and single numbers."""


class Storages(TorchDispatchMode):
    """Sizes of new storages in order, and the largest sum of those alive."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.known: set[int] = set()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage: Any) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.alive += nbytes
        self.peak = max(self.peak, self.alive)
        if nbytes > SCALARS:
            self.sizes.append(nbytes)
        weakref.finalize(storage, self.freed, key, nbytes)

    def freed(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.alive -= nbytes
