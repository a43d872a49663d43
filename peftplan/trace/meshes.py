"""Tensors on different device meshes: no kernel takes them together, so Trainer makes groups of them.

Source: transformers, trainer.py (`create_optimizer`, `_mixed_mesh_grad_norm`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T", bound=torch.Tensor)


def by_mesh(tensors: Iterable[T]) -> list[list[T]]:
    """Tensors in a group for each mesh; those that are no DTensors have one of their own."""
    groups: dict[object, list[T]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(groups.values())


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> None:
    """Clip to this norm as Trainer does."""
    groups = by_mesh(p.grad for p in parameters if p.grad is not None)
    if len(groups) <= 1:
        nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
        return
    norms = [nn.utils.get_total_norm(group) for group in groups]
    total = torch.linalg.vector_norm(torch.stack([getattr(norm, "full_tensor", lambda norm=norm: norm)() for norm in norms]))
    for group in by_mesh(parameters):
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
