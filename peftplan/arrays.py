"""The sizes that a formula takes: whole numbers, or numpy's arrays of them where many sizes are evaluated at once.

Numpy is needed for their types alone: it is an extra, and one size needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Ints: TypeAlias = "NDArray[np.int64]"
Flags: TypeAlias = "NDArray[np.bool_]"
Floats: TypeAlias = "NDArray[np.float64]"
Objects: TypeAlias = "NDArray[np.object_]"
Codes: TypeAlias = "NDArray[np.int8]"
Sizes: TypeAlias = "int | Sequence[int] | NDArray[np.int64]"
"""One size, or several, as a list or an array."""
Size = TypeVar("Size", int, "NDArray[np.int64]")
"""One size, or a size at each point."""
Fact: TypeAlias = "int | NDArray[np.bool_] | NDArray[np.int64]"
"""Whether a size is beyond a limit, at one point or at each."""


class Derived(str):
    """A named size that is computed from others. Equal to its name, as other named sizes are."""

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """The size at these sizes, which may be arrays as well as integers."""
        raise NotImplementedError


def dim_at(dim: int | str, sizes: Mapping[str, Size]) -> Size:
    """A number, or a named size at these sizes."""
    if isinstance(dim, Derived):
        return dim.at(sizes)
    return dim if isinstance(dim, int) else sizes[dim]  # type: ignore[return-value]


class Recorded:
    """A whole number that remembers how it follows from others (`distributed.any_world`)."""

    __slots__ = ()

    def computed(self, op: Callable[[int, int], int], a: object, b: object) -> object:
        """The result of an operation, as another such number."""
        raise NotImplementedError


def smaller(a: Size, b: Size | int) -> Size:
    """The smaller of two sizes, at each point."""
    if type(a) is int and type(b) is int:
        return a if a < b else b
    recorded = _recorded(a, b)
    return a - (a > b) * (a - b) if recorded is None else cast("Size", recorded.computed(min, a, b))


def larger(a: Size, b: Size | int) -> Size:
    """The larger of two sizes, at each point."""
    if type(a) is int and type(b) is int:
        return a if a > b else b
    recorded = _recorded(a, b)
    return a + (b > a) * (b - a) if recorded is None else cast("Size", recorded.computed(max, a, b))


def _recorded(a: object, b: object) -> Recorded | None:
    return a if isinstance(a, Recorded) else b if isinstance(b, Recorded) else None


def numel_at(dims: Sequence[int | str], sizes: Mapping[str, Size]) -> Size:
    """How many elements a tensor of these dims has, of which one or more are named."""
    named = (dim for dim in dims if not isinstance(dim, int))
    first, *others = (dim.at(sizes) if isinstance(dim, Derived) else sizes[dim] for dim in named)
    for other in others:
        first = first * other
    return first * prod(dim for dim in dims if isinstance(dim, int))
