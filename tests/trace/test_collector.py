"""The garbage collector during a trace: what it leaves alone, and that it is as before afterwards."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress

from peftplan.trace.collector import old_objects_let_be


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_it_is_as_before_whatever_happens() -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    with suppress(ZeroDivisionError), old_objects_let_be():
        assert gc.get_threshold()[:2] == before[0][:2]
        with old_objects_let_be():
            pass
        assert gc.get_freeze_count() > before[1]  # the inner one left the outer one's alone
        raise ZeroDivisionError
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


def test_young_cycles_are_collected_and_old_ones_stay() -> None:
    old = Cycle()
    old_one = weakref.ref(old)
    with old_objects_let_be():
        del old
        young = weakref.ref(Cycle())
        for generation in (0, 1):
            gc.collect(generation)
        assert young() is None
        assert old_one() is not None
    gc.collect()
    assert old_one() is None
