"""The layer numbers in the names of modules and tensors."""

from __future__ import annotations

import re


class Layers:
    """Reads the layer number in the names of modules and tensors; `period` layers form a unit."""

    def __init__(self, stack: str, period: int = 1) -> None:
        self.period = period
        self._pattern = re.compile(rf"(?:^|\.){re.escape(stack)}\.(\d+)(?=\.|$)")
        self._numbers: dict[str, int | None] = {}

    def number(self, name: str) -> int | None:
        """The layer in a name."""
        if name not in self._numbers:
            match = self._pattern.search(name)
            self._numbers[name] = int(match.group(1)) if match else None
        return self._numbers[name]

    def unit(self, name: str) -> int | None:
        """The unit that the layer in a name belongs to."""
        number = self.number(name)
        return None if number is None else number // self.period

    def renamed(self, name: str, unit: int) -> str:
        """The name of the same module or tensor in another unit."""
        match = self._pattern.search(name)
        if not match:
            return name
        number = unit * self.period + int(match.group(1)) % self.period
        return f"{name[: match.start(1)]}{number}{name[match.end(1) :]}"
