"""Strict reading of a Hugging Face config.json: named fields, typed and bounded, or one clear error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from peftplan.errors import InputError, MissingError

REQUIRED: Final = object()
"""No default: the field must be in the config. transformers always writes a model's own dimensions, so they are required."""

MAX_DIMENSION = 2**24
"""No published model has a dimension above 16 M (the largest vocabulary is 262,208). A config with more is damaged."""
MAX_LAYERS = 4096
MAX_LABELS = 2**22
"""The most classes of a head. The largest public label sets have 3 M; transformers keeps two dictionaries of all labels."""

# Inside `Fields`, which has methods of these names, a type checker takes `int` for the method.
Int: TypeAlias = int
Str: TypeAlias = str
Bool: TypeAlias = bool


class Fields:
    """The fields of one config, read by name. `name` is shown in errors; aliases are transformers' `attribute_map`."""

    def __init__(self, raw: Mapping[str, object], *, name: str) -> None:
        self.raw, self.name = raw, name

    def _get(self, names: tuple[str, ...], default: object, accepted: str) -> object:
        for name in names:
            if self.raw.get(name) is not None:
                return self.raw[name]
        if default is REQUIRED:
            raise MissingError(f"{self.name}: {' or '.join(names)}", f"the config must state it as {accepted}")
        return default

    def int(self, *names: str, default: object = REQUIRED, low: int = 1, high: int = MAX_DIMENSION) -> int:
        """A whole number in [low, high]; a config value of null counts as absent."""
        accepted = f"a whole number from {low} to {high}"
        value = self._get(names, default, accepted)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(f"{self.name}: {names[0]}", value, f"accepted: {accepted}")
        return value

    def number(self, *names: Str, default: object = REQUIRED, low: float, high: float) -> float:
        """A number in [low, high], integer or float."""
        accepted = f"a number from {low} to {high}"
        value = self._get(names, default, accepted)
        if isinstance(value, bool) or not isinstance(value, (float, int)) or not low <= value <= high:
            raise InputError(f"{self.name}: {names[0]}", value, f"accepted: {accepted}")
        return float(value)

    def optional_int(self, *names: Str, absent: Int | None = None, low: Int = 1, high: Int = MAX_DIMENSION) -> Int | None:
        """A whole number in [low, high], or None for null. A config without the field at all has the class's default `absent`."""
        if all(self.raw.get(n) is None for n in names):
            return None if any(n in self.raw for n in names) else absent
        return self.int(*names, low=low, high=high)

    def layers(self, *names: Str, default: object = REQUIRED) -> tuple[Int, ...]:
        """Layer indices 0 … n-1, where the field states n."""
        return tuple(range(self.int(*names, default=default, high=MAX_LAYERS)))

    def bool(self, *names: Str, default: object = REQUIRED) -> Bool:
        """true or false."""
        value = self._get(names, default, "true or false")
        if not isinstance(value, bool):
            raise InputError(f"{self.name}: {names[0]}", value, "accepted: true or false")
        return value

    def str(self, *names: Str, default: object = REQUIRED) -> Str:
        """A string."""
        value = self._get(names, default, "a string")
        if not isinstance(value, str):
            raise InputError(f"{self.name}: {names[0]}", value, "accepted: a string")
        return value

    def ints(self, *names: Str, default: object = REQUIRED, low: Int = 0, high: Int = MAX_DIMENSION) -> tuple[Int, ...]:
        """A list of whole numbers in [low, high]."""
        accepted = f"a list of whole numbers from {low} to {high}"
        value = self._get(names, default, accepted)
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(v, int) and not isinstance(v, bool) and low <= v <= high for v in value
        ):
            raise InputError(f"{self.name}: {names[0]}", value, f"accepted: {accepted}")
        return tuple(value)

    def strs(self, *names: Str, default: object = REQUIRED) -> tuple[Str, ...]:
        """A list of strings."""
        value = self._get(names, default, "a list of strings")
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise InputError(f"{self.name}: {names[0]}", value, "accepted: a list of strings")
        return tuple(value)

    def divide(self, numerator: Str, whole: Int, denominator: Str, parts: Int) -> Int:
        """whole / parts, such as hidden_size / num_attention_heads. Raises InputError if it leaves a remainder."""
        if whole % parts:
            raise InputError(f"{self.name}: {numerator}", whole, f"accepted: a multiple of {denominator} ({parts})")
        return whole // parts
