"""`Any` stands only where torch forces it."""

from __future__ import annotations

import re
from pathlib import Path

import peftplan

PACKAGE = Path(peftplan.__file__).parent
NEEDS_TORCH = ("trace", "measure", "integrations.py", "rehearse", "libraries")
"""Rooms that handle objects of torch and transformers, whose types the base install does not know."""
ANY = re.compile(r"\bAny\b")


def lines_with_any() -> dict[str, int]:
    """Room → its lines that hold `Any`, imports included."""
    lines: dict[str, int] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0]
        count = sum(bool(ANY.search(line)) for line in file.read_text(encoding="utf-8").splitlines())
        lines[room] = lines.get(room, 0) + count
    return lines


def test_only_rooms_of_torch_hold_any() -> None:
    lines = {room: count for room, count in lines_with_any().items() if count and room not in NEEDS_TORCH}
    assert lines == {}, "use a Protocol, a TypedDict or object"
