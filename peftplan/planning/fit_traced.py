"""The largest size by traces: few of them, since each takes seconds.

A search begins at a guess, which is the answer of the formulas where there are any; two traces then confirm it. Between sizes
that were asked, bytes are taken to grow with the size.
"""

from __future__ import annotations

from collections.abc import Callable

from peftplan.planning.largest import Largest, Probe

GUESSES = {"batch_size": 4, "seq_len": 1024, "r": 16}
"""Where a search begins for a job without formulas."""


def largest_traced(probe: Callable[[int], Probe], *, smallest: int, ceiling: int, guess: int) -> Largest:
    """A size that fits while one more does not; `asked_from` is that size, since smaller ones were not all asked."""
    seen: dict[int, Probe] = {}

    def accepts(size: int) -> bool:
        if size not in seen:
            seen[size] = probe(size)
        return seen[size].accepted

    good, bad = _bracket(accepts, smallest=smallest, ceiling=ceiling, guess=min(max(guess, smallest), ceiling))
    by_halves = False
    while bad - good > 1 and bad > smallest:
        middle = (good + bad) // 2 if by_halves or good < smallest else _between(seen, good, bad)
        good, bad = (middle, bad) if accepts(middle) else (good, middle)
        by_halves = not by_halves
    if good < smallest:
        return Largest(0, smallest)
    return Largest(good, good, bounded=good == ceiling)


def _bracket(accepts: Callable[[int], bool], *, smallest: int, ceiling: int, guess: int) -> tuple[int, int]:
    """A size that fits, and a larger one that does not: one below `smallest` or above `ceiling` where there is none."""
    size, step = guess, 1
    if accepts(size):
        while size < ceiling and accepts(min(size + step, ceiling)):
            size, step = min(size + step, ceiling), 2 * step
        return size, min(size + step, ceiling) if size < ceiling else ceiling + 1
    while size > smallest:
        lower = max(size - step, smallest)
        if accepts(lower):
            return lower, size
        size, step = lower, 2 * step
    return smallest - 1, smallest


def _between(seen: dict[int, Probe], good: int, bad: int) -> int:
    """Where reserved bytes reach the room, on a line through two sizes."""
    low, high = seen[good], seen[bad]
    share = (low.room - low.reserved) / max(high.reserved - low.reserved, 1)
    return min(max(good + int(share * (bad - good)), good + 1), bad - 1)
