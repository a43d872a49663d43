"""Tensors whose size depends on values: where it is known how many places of a mask are true, they have that many rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
REPLACED = frozenset((aten.index.Tensor, aten.nonzero.default, aten.unique_consecutive.default))
"""Operations that depend on values. Without `Selected` they are left to raise, as fake tensors do."""


class Selected(TorchDispatchMode):
    """Runs indexing by a boolean mask as indexing by `rows` positions, and returns those where code asks for the true places.

    `unique_consecutive` returns one value: models only ask whether all samples are alike.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows = rows

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skip dynamo: nothing here is compiled."""
        return False

    def known(self, below: Callable[[Any, Any, Any], Any], func: Any, args: Any, kwargs: Any) -> Any:
        """What the mode below knows of an operation that is passed on; NotImplemented for others."""
        return NotImplemented if func in REPLACED else below(func, args, kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace masks by positions, and pass everything else on."""
        kwargs = kwargs or {}
        if func is aten.index.Tensor and any(map(_is_mask, args[1])):
            return func(args[0], [place for index in args[1] for place in _places(index, self._rows)])
        if func is aten.nonzero.default:
            return args[0].new_empty((self._rows, args[0].dim()), dtype=torch.int64)
        if func is aten.unique_consecutive.default:
            return args[0].new_empty(1), args[0].new_empty(0), args[0].new_empty(0)
        return func(*args, **kwargs)


def _places(index: torch.Tensor | None, rows: int) -> list[torch.Tensor | None]:
    """A mask's true places, one tensor of positions per dim; any other index as it is."""
    if index is None or not _is_mask(index):
        return [index]
    return [index.new_empty(rows, dtype=torch.int64) for _ in range(index.dim())]


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool
