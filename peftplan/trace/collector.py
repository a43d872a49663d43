"""Python's garbage collector during a trace."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEVER = 2**30
_inside = False
"""Whether an outer block is active. Asking `gc` instead takes a quarter of the time of a small trace."""


@contextmanager
def old_objects_let_be() -> Iterator[None]:
    """Keep the collector from scanning old objects: those of imported libraries, and the growing log.

    A trace creates hundreds of thousands of objects, few of them in cycles. Scanning all of them took a third of its time.
    """
    global _inside
    if _inside or gc.get_freeze_count():  # do not unfreeze what other code has frozen
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
