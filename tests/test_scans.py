"""Work without garbage scans, in a process that does much of it."""

from __future__ import annotations

import gc

import pytest

from peftplan import scans
from peftplan.scans import no_scans


class Ring:
    """An object that no reference frees."""

    alive = 0

    def __init__(self) -> None:
        self.itself = self
        Ring.alive += 1

    def __del__(self) -> None:
        Ring.alive -= 1


def test_garbage_of_many_jobs_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own rule lets all 40,000 rings live: none of them survived one of its scans."""
    monkeypatch.setattr(scans, "MOST_LEFT", 2**12)
    gc.collect()
    most = 0
    for _ in range(40):
        with no_scans():
            for _ in range(1000):
                Ring()
        most = max(most, Ring.alive)
    assert 1000 <= most < 10_000


def test_what_a_program_turned_off_or_set_aside_stays_so() -> None:
    gc.disable()
    try:
        with no_scans():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with no_scans():
            with no_scans():
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen - 100  # a few were freed meanwhile
    finally:
        gc.unfreeze()
