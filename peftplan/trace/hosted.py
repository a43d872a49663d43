"""Tensors saved for backward that wait on the host: nothing of them is left on the device until backward copies them back.

Source: torch 2.13, autograd/graph.py (`save_on_cpu`): pinned memory there, both copies on the stream that computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks


class SavedOnHost(saved_tensors_hooks):
    """`save_on_cpu` for fake tensors: keeps what a copy is made from, and makes it anew whenever it is asked for."""

    def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
        def pack(tensor: torch.Tensor) -> tuple[Any, ...]:
            return tensor.size(), tensor.dtype, tensor.device

        def unpack(packed: tuple[Any, ...]) -> torch.Tensor:
            size, dtype, device = packed
            return torch.empty(size, dtype=dtype, device=device)

        super().__init__(pack, unpack)
