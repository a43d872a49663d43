"""A rank of a world whose size stays open: whole numbers that remember how they follow from the world size, the rank and the
number of rows.

A step is recorded for one rank of one world. Where the code goes by such a number, which of two is larger or whether it is zero,
the answer is kept: the record holds for every other rank and world size that give the same answers, each number computed anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import cast

from pydantic import PrivateAttr

from peftplan.arrays import Recorded
from peftplan.distributed.strategy import Distributed

LATEST_KEPT = 16
Op = Callable[[int, int], int]


class Worlds:
    """Numbers computed from a world size, a rank and a batch size, in order, and what the code went by."""

    def __init__(self, world: int, rank: int = 0, batch_size: int = 1) -> None:
        own = world, rank, batch_size
        self._values: list[int] = [*own]
        self._steps: list[tuple[Op | None, int, int]] = []
        """Of every further number: an operation and the places of its operands, or a whole number."""
        self.wholes: dict[int, int] = {}
        """The places of whole numbers."""
        self.results: dict[tuple[Op, int, int | None], Number] = {}
        """An operation and the places of its operands → the number that it gave."""
        self._answers: dict[int, int] = {}
        """A number's place → its value, where the code went by it."""
        self._of_batch: dict[int, None] = {2: None}
        """The places of numbers that follow from the batch size."""
        self._closed = False
        self._latest: dict[tuple[int, int], list[int]] = {(world, rank): self._values}
        """Ranks of worlds that were asked for last → every number there, at some batch size."""
        self.world, self.rank, self.batch_size = (cast(int, Number(self, place)) for place in range(len(own)))

    def at(self, world: int, rank: int, batch_size: int = 1) -> list[int] | None:
        """Every number for a rank of a world, by place; None where the step is another one. The record ends here."""
        self._closed = True
        values = self._latest.get((world, rank))
        try:
            if values is None:
                values = self._evaluated([world, rank, batch_size])
            elif values[2] != batch_size:
                values = self._with_batch([*values], batch_size)
        except ZeroDivisionError:  # behind an answer that differs
            return None
        self._latest[world, rank] = values
        if len(self._latest) > LATEST_KEPT:
            del self._latest[next(iter(self._latest))]
        return values if all(values[place] == value for place, value in self._answers.items()) else None

    def _evaluated(self, values: list[int]) -> list[int]:
        """All numbers, which follow from the first ones."""
        add = values.append
        for op, a, b in self._steps:
            add(a if op is None else op(values[a], values[b]))
        return values

    def _with_batch(self, values: list[int], batch_size: int) -> list[int]:
        """All numbers at another batch size."""
        values[2] = batch_size
        for place in [*self._of_batch][1:]:
            op, a, b = self._steps[place - 3]
            assert op is not None
            values[place] = op(values[a], values[b])
        return values

    def answer(self, place: int) -> int:
        """The value of a number that the code goes by."""
        if self._closed and place not in self._answers:
            raise AssertionError("a number that differs between worlds is read as one of all")
        return self._answers.setdefault(place, self._values[place])

    def value(self, place: int) -> int:
        """The value at the world size of the record, to show."""
        return self._values[place]

    def computed(self, op: Op, a: object, b: object) -> object:
        """The result of an operation: another number, but a float where an operand is one."""
        left, right = self._place(a), self._place(b)
        if left is None or right is None:
            floats = isinstance(a, float) or isinstance(b, float)
            return op(float(a), float(b)) if floats else NotImplemented  # type: ignore[arg-type]
        number = self.results.get((op, left, right))
        if number is None:
            place = self._add((op, left, right), int(op(self._values[left], self._values[right])))
            number = self.results[op, left, right] = Number(self, place)
        return number

    def _place(self, number: object) -> int | None:
        if type(number) is Number:
            assert number.worlds is self, "numbers of two records meet"
            return number.place
        if type(number) is not int and type(number) is not bool:
            return None
        place = self.wholes.get(number)
        if place is None:
            place = self.wholes[number] = self._add((None, number, 0), number)
        return place

    def _add(self, step: tuple[Op | None, int, int], value: int) -> int:
        assert not self._closed, "a number of a record that has ended is computed with"
        place = len(self._values)
        op, a, b = step
        if op is not None and (a in self._of_batch or b in self._of_batch):
            self._of_batch[place] = None
        self._steps.append(step)
        self._values.append(value)
        return place


def _forwards(op: Op) -> Callable[[Number, object], object]:
    def apply(self: Number, other: object) -> object:
        worlds = self.worlds
        known = worlds.results.get((op, self.place, worlds.wholes.get(other))) if type(other) is int else None
        return worlds.computed(op, self, other) if known is None else known

    return apply


def _backwards(op: Op) -> Callable[[Number, object], object]:
    return lambda self, other: self.worlds.computed(op, other, self)


class Number(Recorded):
    """A whole number, for code that computes with whole numbers. What it does not define goes by its value (`Worlds.answer`)."""

    __slots__ = ("place", "worlds")

    def __init__(self, worlds: Worlds, place: int) -> None:
        self.worlds, self.place = worlds, place

    @property  # type: ignore[misc]
    def __class__(self) -> type[int]:  # type: ignore[override]
        return int

    def computed(self, op: Op, a: object, b: object) -> object:
        """The result of an operation, in the record of this number."""
        return self.worlds.computed(op, a, b)

    __add__, __radd__ = _forwards(operator.add), _backwards(operator.add)
    __sub__, __rsub__ = _forwards(operator.sub), _backwards(operator.sub)
    __mul__, __rmul__ = _forwards(operator.mul), _backwards(operator.mul)
    __floordiv__, __rfloordiv__ = _forwards(operator.floordiv), _backwards(operator.floordiv)
    __mod__, __rmod__ = _forwards(operator.mod), _backwards(operator.mod)
    __lt__, __le__, __gt__, __ge__ = (_forwards(op) for op in (operator.lt, operator.le, operator.gt, operator.ge))

    def __eq__(self, other: object) -> bool:
        if type(other) is Number and other.worlds is not self.worlds:  # a table that outlives the record
            return False
        return cast(bool, self.worlds.computed(operator.eq, self, other))

    def __ne__(self, other: object) -> bool:
        return (self == other) == 0

    def __hash__(self) -> int:
        return hash((id(self.worlds), self.place))  # not that of its value: no table takes it for the whole number

    def __neg__(self) -> object:
        return self.worlds.computed(operator.sub, 0, self)

    def __bool__(self) -> bool:
        return not self.worlds.answer(cast(Number, self == 0).place)

    def __index__(self) -> int:
        return self.worlds.answer(self.place)

    __int__ = __index__

    def __float__(self) -> float:
        return float(int(self))

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(int(self), name)

    def __str__(self) -> str:
        return str(self.worlds.value(self.place))

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return format(self.worlds.value(self.place), spec)


def place_of(number: object) -> int | None:
    """The place of such a number in its record; None for a number that is the same in all worlds."""
    return number.place if type(number) is Number else None


def as_recorded(numbers: Iterable[object]) -> tuple[object, ...]:
    """These values, with such numbers as whole ones: those of the world size that was recorded."""
    return tuple([number.worlds.value(number.place) if type(number) is Number else number for number in numbers])


class AnyWorld(Distributed):
    """A strategy whose world size is such a number. Unequal to that of any other record."""

    _worlds: Worlds = PrivateAttr()
    _steps_flat: bool = PrivateAttr()

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._worlds.world

    @property
    def steps_flat(self) -> bool:
        """As in `over_any_world`."""
        return self._steps_flat


def over_any_world(distributed: Distributed, worlds: Worlds, *, steps_flat: bool) -> AnyWorld:
    """A strategy over the world size of a record. `steps_flat`: whatever tensors lie in FSDP1's flat parameters, which differ
    from world to world."""
    anywhere = AnyWorld.model_construct(**dict(distributed))
    anywhere._worlds, anywhere._steps_flat = worlds, steps_flat
    return anywhere
