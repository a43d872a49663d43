"""Progress of a trace: a callback gets the current activity and the share of the work that is done."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[str, float], None]


def silent(what: str, share: float) -> None:
    """Report nothing."""


def part(tell: Tell, *, number: int, of: int) -> Tell:
    """The callback for one of several parts of about equal duration."""
    return lambda what, share: tell(what, (number + share) / of)
