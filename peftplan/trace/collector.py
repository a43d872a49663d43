"""Python's garbage collector during a trace."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEVER = 2**30
_inside = False
"""Whether an outer block is at work: to count what it has frozen takes as long as a quarter of a small trace."""


@contextmanager
def old_objects_let_be() -> Iterator[None]:
    """Young objects are collected as ever, old ones are not: what the imported libraries made, and the log as it grows.

    A trace makes objects by the hundred thousand, few of them in cycles; looking at all of them again took a third of its time.
    """
    global _inside
    if _inside or gc.get_freeze_count():  # what other code has frozen stays so
        yield
        return
    _inside = True
    young, middle, old = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(young, middle, NEVER)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)
        gc.unfreeze()
        _inside = False
