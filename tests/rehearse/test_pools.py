"""Tasks of a thread pool run in order, and one that waits for the program does not hang it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("torch")

from peftplan.rehearse.inside import pools


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of pools that start now. `submit` is itself again after the test."""
    monkeypatch.setattr(ThreadPoolExecutor, "submit", ThreadPoolExecutor.submit)
    told: list[str] = []
    pools.start(told.append)
    return told


def test_tasks_end_in_the_order_in_which_they_are_submitted(notes: list[str]) -> None:
    """In four threads the shortest would end first."""
    ended: list[float] = []

    def task(seconds: float) -> None:
        time.sleep(seconds)
        ended.append(seconds)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(task, (0.08, 0.06, 0.04, 0.02)))
    assert ended == [0.08, 0.06, 0.04, 0.02]
    assert notes == []


def test_a_task_that_waits_for_the_program_is_left_alone(notes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "PATIENCE", 0.02)
    event = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(event.wait, 10)
        event.set()
        assert waiting.result()
        pool.submit(str)
    assert notes == [pools.LEFT_ALONE]
