"""A program of events: by hand, and both replays of random jobs against each other, to the byte."""

from __future__ import annotations

import random
from array import array
from itertools import chain, islice

import pytest

from peftplan.allocator import program
from peftplan.allocator.events import Event
from peftplan.allocator.program import (
    END,
    FREE,
    HOLD,
    LEAVE,
    LET_GO,
    MAKE,
    PHASE,
    TAKE,
    Program,
    Replayed,
    interpret,
    of_log,
    replay,
    runs_within,
)
from peftplan.allocator.replay import replay as events_replayed
from peftplan.units import MIB
from tools.replay_jobs import both, runs

REPLAYS = [
    pytest.param(replay, marks=pytest.mark.skipif(not program.COMPILED, reason="no compiled replay was built")),
    interpret,
]
EVENTS = (
    (PHASE, 0, 0, 0, 0),
    (TAKE, 0, 3, 0, 0),
    (HOLD, 0, 1, 0, 0),
    (LET_GO, 0, 0, 0, 0),
    (PHASE, 1, 0, 0, 0),
    (MAKE, 5, 2, 2, 0),
    (FREE, 5, 2, 2, 0),
    (END, 0, 0, 0, 0),
)
BY_HAND = Program(array("q", chain.from_iterable(EVENTS)).tobytes(), 6, 1, ("load", "forward"))
SIZES = (11 * MIB // 2, 39 * MIB // 2, 1000)


@pytest.mark.parametrize("replayed_by", REPLAYS)
def test_a_program_by_hand(replayed_by: object) -> None:
    """Three of 5.5 MiB fill a segment of 20 up to 3.5; 19.5 MiB take another one whole. 1,000 bytes take 1,024 of one of 2."""
    assert callable(replayed_by)
    load, forward = 33 * MIB // 2 + 20 * MIB, 33 * MIB // 2 + 2 * 1024
    assert replayed_by(BY_HAND, SIZES) == Replayed({"load": load, "forward": forward}, 42 * MIB)
    assert replayed_by(BY_HAND, SIZES, capacity=40 * MIB).reserved == 40 * MIB  # the free segment goes for the small one
    with pytest.raises(MemoryError):
        replayed_by(BY_HAND, SIZES, capacity=39 * MIB)


@pytest.mark.parametrize("replayed_by", REPLAYS)
def test_what_is_left_stays_when_a_step_ends(replayed_by: object) -> None:
    """5.5 MiB stay beside the 1,024 bytes that the second step takes under the same storage."""
    assert callable(replayed_by)
    events = ((PHASE, 0), (MAKE, 5, 0, 1), (LEAVE, 5), (END,), (PHASE, 1), (MAKE, 5, 2, 1), (END,))
    written = Program(array("q", chain.from_iterable((*e, 0, 0, 0, 0)[:5] for e in events)).tobytes(), 6, 0, ("first", "second"))
    assert replayed_by(written, SIZES).allocated == {"first": 11 * MIB // 2, "second": 11 * MIB // 2 + 1024}


def test_a_log_gives_as_a_program_what_it_gives_event_by_event() -> None:
    """Tensors of five sizes, freed in any order, the cache emptied now and then, in three phases."""
    drawn = random.Random(7)
    log: list[Event] = []
    alive: list[int] = []
    for number in range(3000):
        phase = ("load", "forward", "backward")[number // 100 % 3]
        if alive and drawn.random() < 0.5:
            log.append(Event("free", alive.pop(drawn.randrange(len(alive))), phase=phase))
        elif drawn.random() < 0.01:
            log.append(Event("empty_cache", phase=phase))
        else:
            log.append(Event("alloc", number, drawn.choice((0, 700, 3 * MIB, 15 * MIB, 41 * MIB)), phase=phase))
            alive.append(number)
    whole = events_replayed(log)
    replayed = replay(*of_log(log))
    assert replayed.reserved == whole.peaks.reserved
    assert replayed.allocated == {phase: peaks.allocated for phase, peaks in whole.by_phase.items()}
    most = whole.peaks.reserved
    for capacity in (most, most // 2, most // 4):
        assert runs_within(*of_log(log), capacity) == (events_replayed(log, capacity_bytes=capacity).oom is None)


@pytest.mark.parametrize("nbytes", [2**57, 2**70])
def test_more_than_64_bits_hold(nbytes: int) -> None:
    assert replay(BY_HAND, (nbytes, *SIZES[1:])) == interpret(BY_HAND, (nbytes, *SIZES[1:]))


@pytest.mark.skipif(not program.COMPILED, reason="no compiled replay was built")
def test_both_replays_of_random_jobs_are_the_same() -> None:
    """More of them: tools/replay_jobs.py."""
    draw = random.Random(0)
    capped = []
    for name, run in islice(runs(seed=0, largest=2e9), 40):
        compiled, interpreted = both(run)
        assert compiled == interpreted, name
        assert compiled is not None
        limited = both(run, int(compiled.reserved * draw.uniform(0.9, 1.0)))
        assert limited[0] == limited[1], name
        capped.append(limited[0] is not None)
    assert True in capped
    assert False in capped


@pytest.mark.skipif(not program.COMPILED, reason="no compiled replay was built")
@pytest.mark.parametrize(
    "event", [(TAKE, 3, 1, 0, 0), (MAKE, 6, 0, 1, 0), (LET_GO, 1, 0, 0, 0), (99, 0, 0, 0, 0), (PHASE, -1, 0, 0, 0)]
)
def test_an_event_that_names_nothing_is_refused(event: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="names what is not in its tables"):
        replay(BY_HAND._replace(events=array("q", event).tobytes()), SIZES)
