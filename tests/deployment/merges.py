"""Two witnesses of what a merge allocates: torch's profiler on the CPU, and every storage that is made on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def cpu_temporaries(build: Callable[[], Any]) -> int:
    """Bytes that `merge_and_unload` takes at most on top of the model: the profiler sees each allocation of the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model = build()
        with torch.profiler.record_function("merge starts"):
            pass
        model.merge_and_unload()
    now = start = peak = 0
    started = False
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "merge starts":
            started, start, peak = True, now, now
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now) if started else 0
    return peak - start


class Storages(TorchDispatchMode):
    """Bytes of all storages alive, those of a model from the start. Meta tensors take a GPU's path: no cast copies."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self.meet(tensor)
        self.start = self.now

    def meet(self, tensor: torch.Tensor) -> None:
        """Count a storage once, until it is gone."""
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = nbytes
            self.now += nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        """The storage has been freed."""
        self.now -= self.known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.meet(tensor)
        return out


def meta_temporaries(model: Any) -> int:
    """Bytes that `merge_and_unload` takes at most on top of a model on the meta device."""
    with Storages(model) as seen:
        model.merge_and_unload()
    return seen.peak - seen.start
