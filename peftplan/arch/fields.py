"""Strict reading of a Hugging Face config.json: named fields, typed and bounded, or one clear error."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any, Final

from peftplan.errors import InputError

REQUIRED: Final = object()
"""No default: the field must be in the config. transformers always writes a model's own dimensions, so they are required."""

MAX_DIMENSION = 2**24
"""No published model has a dimension above 16 M (the largest vocabulary is 262,208); more is a damaged config."""
MAX_LAYERS = 4096


class Fields:
    """The fields of one config, read by name. `name` is shown in errors; aliases are transformers' `attribute_map`."""

    def __init__(self, raw: Mapping[str, Any], *, name: str) -> None:
        self.raw, self.name = raw, name

    def _get(self, names: tuple[str, ...], default: Any, accepted: str) -> Any:
        for name in names:
            if self.raw.get(name) is not None:
                return self.raw[name]
        if default is REQUIRED:
            raise InputError(f"{self.name}: {' or '.join(names)}", None, f"the config must state it as {accepted}")
        return default

    def int(self, *names: str, default: Any = REQUIRED, low: int = 1, high: int = MAX_DIMENSION) -> int:
        """A whole number in [low, high]; a config value of null counts as absent."""
        accepted = f"a whole number from {low} to {high}"
        value = self._get(names, default, accepted)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(f"{self.name}: {names[0]}", value, f"accepted: {accepted}")
        return value

    def number(self, *names: builtins.str, default: Any = REQUIRED, low: float, high: float) -> float:
        """A number in [low, high], whole or not."""
        accepted = f"a number from {low} to {high}"
        value = self._get(names, default, accepted)
        if isinstance(value, bool) or not isinstance(value, (float, int)) or not low <= value <= high:
            raise InputError(f"{self.name}: {names[0]}", value, f"accepted: {accepted}")
        return float(value)

    def optional_int(self, *names: builtins.str, absent: builtins.int | None = None, low: builtins.int = 1, high: builtins.int = MAX_DIMENSION) -> builtins.int | None:
        """A whole number in [low, high], or None for null. A config without the field at all has the class's default `absent`."""
        if all(self.raw.get(n) is None for n in names):
            return None if any(n in self.raw for n in names) else absent
        return self.int(*names, low=low, high=high)

    def layers(self, *names: builtins.str, default: Any = REQUIRED) -> tuple[builtins.int, ...]:
        """Layer indices 0 … n-1 from a field that states their number."""
        return tuple(range(self.int(*names, default=default, high=MAX_LAYERS)))

    def bool(self, *names: builtins.str, default: Any = REQUIRED) -> builtins.bool:
        """true or false."""
        value = self._get(names, default, "true or false")
        if not isinstance(value, bool):
            raise InputError(f"{self.name}: {names[0]}", value, "accepted: true or false")
        return value

    def str(self, *names: builtins.str, default: Any = REQUIRED) -> builtins.str:
        """A text."""
        value = self._get(names, default, "a text")
        if not isinstance(value, str):
            raise InputError(f"{self.name}: {names[0]}", value, "accepted: a text")
        return value

    def ints(self, *names: builtins.str, default: Any = REQUIRED, low: builtins.int = 0, high: builtins.int = MAX_DIMENSION) -> tuple[builtins.int, ...]:
        """A list of whole numbers in [low, high]."""
        accepted = f"a list of whole numbers from {low} to {high}"
        value = self._get(names, default, accepted)
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(v, int) and not isinstance(v, bool) and low <= v <= high for v in value
        ):
            raise InputError(f"{self.name}: {names[0]}", value, f"accepted: {accepted}")
        return tuple(value)

    def strs(self, *names: builtins.str, default: Any = REQUIRED) -> tuple[builtins.str, ...]:
        """A list of texts."""
        value = self._get(names, default, "a list of texts")
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise InputError(f"{self.name}: {names[0]}", value, "accepted: a list of texts")
        return tuple(value)

    def divide(self, numerator: builtins.str, whole: builtins.int, denominator: builtins.str, parts: builtins.int) -> builtins.int:
        """whole / parts, which must come out even, such as hidden_size / num_attention_heads."""
        if whole % parts:
            raise InputError(f"{self.name}: {numerator}", whole, f"accepted: a multiple of {denominator} ({parts})")
        return whole // parts
