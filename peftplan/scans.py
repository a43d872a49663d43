"""Work during which Python does not scan for garbage: what makes many small objects, which references free."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

MOST_LEFT = 2**20
"""Objects that work may leave until they are scanned. Python starts a full scan by the number of those that survived its own
scans, among which they are not: a process that planned 500 jobs had 4.2 million objects, half of them garbage."""
_num_left = 0


@contextmanager
def no_scans() -> Iterator[None]:
    """Turn the garbage collector off during the work, and leave what remains to its next full scan. Its scans took a fifth of the
    time in which a job is compiled."""
    global _num_left
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():  # what a program has set aside stays aside
                _num_left += gc.get_count()[0]
                gc.freeze()
                gc.unfreeze()
            gc.enable()
            if _num_left > MOST_LEFT:
                _num_left = 0
                gc.collect()
