"""Hooks that backward calls where a gradient passes, such as those that ranks gather and reduce at."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Node, Tensor

T = TypeVar("T")


def hooked(f: Tape, x: Tensor, hook: Callable[[T], None], of: T) -> Tensor:
    """`x`, whose gradient calls `hook(of)` when it arrives, and is then handed on; `x` itself where no gradient will."""
    node = f.record(_hook_backward, (x,), hook, of)
    return x if node is None else Tensor(x.storage, x.dims, x.dtype, node)


def _hook_backward(f: Tape, node: Node, saved: tuple[Callable[[T], None], T], g: Tensor) -> Tensor:
    hook, of = saved
    hook(of)
    return g
