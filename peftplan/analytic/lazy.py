"""Sizes at many points, computed only when they are read: formulas name many more sizes than the tensors of a step have."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from peftplan.arrays import Ints

Operand = object
"""A size, or a whole number."""


class Lazy:
    """A size at each point, computed from others when its values are first read."""

    def __init__(self, compute: Callable[..., Ints], operands: Sequence[Operand]) -> None:
        self._compute, self._operands = compute, operands
        self._values: Ints | None = None

    @property
    def values(self) -> Ints:
        """The size at each point."""
        if self._values is None:
            self._values = self._compute(*[of.values if isinstance(of, Lazy) else of for of in self._operands])
            self._operands = ()  # whose values others may no longer need
        return self._values

    def __neg__(self) -> Lazy:
        return Lazy(operator.neg, (self,))

    def __bool__(self) -> bool:
        raise TypeError("a size at many points decides nothing")


def lazy(values: Ints) -> Ints:
    """A size that formulas take as they take an array."""
    return cast("Ints", Lazy(lambda: values, ()))


def values_of(size: Ints) -> Ints:
    """The values of a size that may be `lazy`."""
    of_size: object = size
    return of_size.values if isinstance(of_size, Lazy) else size


def _operators() -> None:
    """Define the operators that formulas use."""
    for name in ("add", "sub", "mul", "floordiv", "mod", "and", "rshift", "lt", "le", "gt", "ge", "eq"):
        compute = getattr(operator, f"{name}_" if name == "and" else name)
        setattr(Lazy, f"__{name}__", lambda self, other, compute=compute: Lazy(compute, (self, other)))
        setattr(Lazy, f"__r{name}__", lambda self, other, compute=compute: Lazy(compute, (other, self)))


_operators()
