"""Hooks that backward calls where a gradient passes, such as those that ranks gather and reduce at."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TypeVar

from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Tensor

T = TypeVar("T")


def hooked(f: Tape, x: Tensor, hook: Callable[[T], None], of: T) -> Tensor:
    """`x`, whose gradient calls `hook(of)` when it arrives, and is then handed on; `x` itself where no gradient will."""
    node = f.record(_hook_backward, (x,), hook, of)
    return x if node is None else Tensor(x.storage, x.dims, x.dtype, node)


def all_hooked(f: Tape, xs: tuple[Tensor, ...], hook: Callable[[T], None], of: T) -> tuple[Tensor, ...]:
    """The same of several, whose gradients call it when the last has arrived; others are handed on as they are."""
    node, number = f.record(_all_hook_backward, tuple(x for x in xs if x.node is not None), hook, of), count()
    return (
        xs if node is None else tuple(x if x.node is None else Tensor(x.storage, x.dims, x.dtype, node, next(number)) for x in xs)
    )


def _all_hook_backward(f: Tape, node: Node, saved: tuple[Callable[[T], None], T], *gradients: Tensor) -> Gradients:
    hook, of = saved
    hook(of)
    return gradients


def _hook_backward(f: Tape, node: Node, saved: tuple[Callable[[T], None], T], g: Tensor) -> Tensor:
    hook, of = saved
    hook(of)
    return g
