"""Values of a program's names: plain values, objects that a call made, and what several possible values have in common."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence

MOST_VALUES = 1_000
"""Most values in the value of a name, nested ones included."""
OF_TORCH = re.compile(r"<torch(\.\w+)+>")
"""A name of torch, such as that of a dtype."""
UNKNOWN = object()
"""What unequal values have in common."""


class Instance(dict[str, object]):
    """The known fields of an object: all of the program's own class, and those written to a library's object."""

    def __init__(
        self, *fields: object, made_by: Iterable[ast.Call] = (), is_copy: bool = False, may_be_none: bool = False
    ) -> None:
        super().__init__(*fields)
        self.made_by = frozenset(made_by)
        """The calls of which one made this object of a library."""
        self.is_copy = is_copy
        """Whether it is a copy: writing to it does not change the object that the call made."""
        self.may_be_none = may_be_none
        """Whether it may be None instead."""

    def __eq__(self, other: object) -> bool:
        """Objects of a library are equal if the same calls made them."""
        return isinstance(other, Instance) and self.made_by == other.made_by and super().__eq__(other)

    __hash__ = None

    def with_fields(self, fields: Mapping[str, object]) -> Instance:
        """The same object with more known fields."""
        return Instance({**self, **fields}, made_by=self.made_by, is_copy=self.is_copy, may_be_none=self.may_be_none)


def one_of(values: Sequence[object]) -> object:
    """What is known if one of several values applies: the value if all are equal, or an object that one of several calls made."""
    first, *others = values
    if all(each == first for each in others):
        return first
    if all(isinstance(each, dict) and not isinstance(each, Instance) for each in values):
        return _agreed([each for each in values if isinstance(each, dict)])
    objects = [each for each in values if isinstance(each, Instance) and each.made_by]
    if not objects or any(each is not None and not (isinstance(each, Instance) and each.made_by) for each in values):
        return UNKNOWN
    fields = {name: value for name, value in objects[0].items() if all(each.get(name, UNKNOWN) == value for each in objects)}
    return Instance(
        fields,
        made_by=frozenset[ast.Call]().union(*(each.made_by for each in objects)),
        is_copy=any(each.is_copy for each in objects),
        may_be_none=None in values or any(each.may_be_none for each in objects),
    )


def _agreed(settings: Sequence[dict[str, object]]) -> dict[str, object]:
    """A dictionary of which several may apply: what all say, and `<key>` under other keys, which it may lack."""
    first, keys = settings[0], dict.fromkeys(key for each in settings for key in each)
    return {key: first[key] if all(each.get(key, UNKNOWN) == first.get(key) for each in settings) else f"<{key}>" for key in keys}


def plain(value: object) -> bool:
    """Whether a value is known in full."""
    if isinstance(value, Instance):
        return False
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    if isinstance(value, dict):
        return all(map(plain, value.values()))
    return not isinstance(value, str) or not value.startswith("<") or OF_TORCH.fullmatch(value) is not None


def size(value: object) -> int:
    """How many values a value contains, counted up to a few more than MOST_VALUES."""
    count, todo = 0, [value]
    while todo and count <= MOST_VALUES:
        each = todo.pop()
        count += 1
        todo += each if isinstance(each, list) else each.values() if isinstance(each, dict) else ()
    return count


def contains(value: object, part: object) -> bool:
    """Whether a value is an object, or holds this very one."""
    parts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return value is part or any(contains(each, part) for each in parts)
