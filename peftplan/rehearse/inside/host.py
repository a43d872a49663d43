"""Host memory that the program's tensors take: what a step offloads, and what it pins for copies."""

from __future__ import annotations

import ctypes

import torch

from peftplan.rehearse.inside import alive


def host_bytes() -> dict[str, int]:
    """`pinned`: bytes that were pinned at most, as the driver was asked. `pageable`: bytes of other tensors on the host now."""
    pinned = getattr(ctypes.CDLL(None), "emulated_pinned", None)
    if pinned is not None:
        pinned.restype = ctypes.c_size_t
    return {"pinned": pinned() if pinned is not None else 0, "pageable": _pageable()}


def _pageable() -> int:
    storages = {}
    for thing in alive.objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
            tensor = getattr(thing, "_local_tensor", thing)
            if (address := alive.address(tensor)) is not None and not tensor.is_pinned():
                storages[address] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
