"""`Any` stands where torch forces it; elsewhere its lines only become fewer."""

from __future__ import annotations

import re
from pathlib import Path

import peftplan

PACKAGE = Path(peftplan.__file__).parent
NEEDS_TORCH = ("trace", "measure", "integrations.py", "rehearse", "libraries")
"""Rooms that handle objects of torch and transformers, whose types the base install does not know."""
TYPED = ("tape", "depth", "optim")
"""Rooms without `Any`."""
MOST = 259
"""Lines outside the rooms that need torch that hold `Any`; lower it when you take some away."""
ANY = re.compile(r"\bAny\b")


def lines_with_any() -> dict[str, int]:
    """Room → its lines that hold `Any`, imports included."""
    lines: dict[str, int] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0]
        count = sum(bool(ANY.search(line)) for line in file.read_text(encoding="utf-8").splitlines())
        lines[room] = lines.get(room, 0) + count
    return lines


def test_lines_with_any_only_become_fewer() -> None:
    count = sum(count for room, count in lines_with_any().items() if room not in NEEDS_TORCH)
    assert count <= MOST, "use a Protocol, a TypedDict or object"
    assert count > MOST - 50, f"lower MOST to {count}"


def test_what_the_tape_handles_is_typed() -> None:
    assert {room: count for room, count in lines_with_any().items() if room in TYPED} == {"depth": 0, "optim": 0, "tape": 0}
