"""A stand-in for `peftplan.measure.cuda.Cuda` on the CPU: it counts storages as torch's CUDA allocator rounds them.

A dispatch mode sees every operation of the thread that opened the device and counts each new storage until it is freed. Reserved
bytes only grow, by whole segments of 2 MiB, until the cache is emptied. `capacity` makes allocations fail as CUDA's do.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftplan.measure.cuda import Facts, Reading
from peftplan.units import GIB, MIB, ceil_div, round512

CONTEXT = 300 * MIB
OTHERS = 100 * MIB
"""What other processes hold on the card."""
SEGMENT = 2 * MIB


class Counter(TorchDispatchMode):
    """Sums the storages that are alive."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.live: dict[int, weakref.ref[Any]] = {}
        self.allocated = self.peak = self.reserved = self.peak_reserved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, out)):  # weights that a thread of the loader made are first seen as arguments
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self.see(leaf.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, round512(storage.nbytes())
        if key in self.live or not size:
            return
        if self.allocated + size > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.\nMore lines that nobody reads.")

        def freed(reference: Any) -> None:
            if self.live.get(key) is reference:
                del self.live[key]
            self.allocated -= size

        self.live[key] = weakref.ref(storage, freed)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, ceil_div(self.allocated, SEGMENT) * SEGMENT)
        self.peak_reserved = max(self.peak_reserved, self.reserved)


class Double:
    """A device that counts on the CPU. `process_known` False: as in a container, where NVML does not know our process."""

    backend = "gloo"

    def __init__(self, *, capacity: int = 64 * GIB, process_known: bool = True) -> None:
        self.torch_device = torch.device("cpu")
        self.before_bytes: int | None = OTHERS
        self.capacity = capacity
        self.process_known = process_known
        self.counter = Counter(capacity)
        self.counter.__enter__()
        self.synchronized = 0
        self.saved: list[Path] = []

    def close(self) -> None:
        self.counter.__exit__(None, None, None)

    def __enter__(self) -> Double:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def facts(self) -> Facts:
        return Facts("NVIDIA A100-SXM4-80GB", "8.0", self.capacity, "550.54.15", "12.8")

    def synchronize(self) -> None:
        self.synchronized += 1

    def empty_cache(self) -> None:
        self.counter.reserved = ceil_div(self.counter.allocated, SEGMENT) * SEGMENT

    def reset_peaks(self) -> None:
        self.counter.peak, self.counter.peak_reserved = self.counter.allocated, self.counter.reserved

    def read(self) -> Reading:
        c = self.counter
        return Reading(c.allocated, c.reserved, c.peak, c.peak_reserved)

    def free_bytes(self) -> int:
        return self.capacity - self.counter.reserved

    def process_bytes(self) -> int | None:
        return CONTEXT + self.counter.reserved if self.process_known else None

    def used_bytes(self) -> int | None:
        return OTHERS + CONTEXT + self.counter.reserved

    def context_bytes(self) -> int | None:
        return CONTEXT

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=dtype)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, torch.OutOfMemoryError)

    def start_history(self) -> None:
        self.saved.clear()

    def save_history(self, path: Path) -> None:
        path.write_bytes(b"snapshot")
        self.saved.append(path)
