"""How far a trace is, for whoever waits: a callback takes what is done now and the share of the whole that is behind."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[str, float], None]


def silent(what: str, share: float) -> None:
    """Nobody waits."""


def part(tell: Tell, *, number: int, of: int) -> Tell:
    """The voice of one of several parts that take about as long."""
    return lambda what, share: tell(what, (number + share) / of)
