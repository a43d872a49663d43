"""A program of events: by hand, and both replays of random jobs against each other, to the byte."""

from __future__ import annotations

import random
from array import array
from itertools import chain, islice

import pytest

from peftplan.allocator import program
from peftplan.allocator.config import AllocatorConfig
from peftplan.allocator.events import Event
from peftplan.allocator.program import (
    END,
    END_OWN,
    FREE,
    HOLD,
    LAYER,
    LEAVE,
    LET_GO,
    MAKE,
    OWN,
    PHASE,
    REPEAT,
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
def test_a_program_by_hand_in_segments_that_grow(replayed_by: object) -> None:
    """Three of 5.5 MiB leave 3.5 of a page of 20; 19.5 MiB take them and 16 of a second page, which goes back for small ones."""
    assert callable(replayed_by)
    load, forward = 36 * MIB, 33 * MIB // 2 + 2 * 1024
    assert replayed_by(BY_HAND, SIZES, expandable=True) == Replayed({"load": load, "forward": forward}, 42 * MIB)
    assert replayed_by(BY_HAND, SIZES, expandable=True, capacity=40 * MIB).reserved == 40 * MIB
    with pytest.raises(MemoryError):
        replayed_by(BY_HAND, SIZES, expandable=True, capacity=39 * MIB)


@pytest.mark.parametrize("replayed_by", REPLAYS)
def test_what_is_left_stays_when_a_step_ends(replayed_by: object) -> None:
    """5.5 MiB stay beside the 1,024 bytes that the second step takes under the same storage."""
    assert callable(replayed_by)
    events = ((PHASE, 0), (MAKE, 5, 0, 1), (LEAVE, 5), (END,), (PHASE, 1), (MAKE, 5, 2, 1), (END,))
    written = Program(array("q", chain.from_iterable((*e, 0, 0, 0, 0)[:5] for e in events)).tobytes(), 6, 0, ("first", "second"))
    assert replayed_by(written, SIZES).allocated == {"first": 11 * MIB // 2, "second": 11 * MIB // 2 + 1024}


def random_log(draw: random.Random, length: int) -> list[Event]:
    """Tensors of a few sizes on some streams, freed in any order, the cache emptied now and then, in three phases."""
    any_size = (0, 1, 700, MIB, MIB + 1, 39 * MIB // 2, draw.randrange(1, 4096), draw.randrange(MIB, 80 * MIB))
    sizes, streams = draw.choices(any_size, k=6), draw.choice((1, 1, 2, 4, 40))
    frees, empties = draw.uniform(0.3, 0.55), draw.choice((0, 0.01, 0.1))
    log: list[Event] = []
    alive: list[int] = []
    for number in range(length):
        phase = ("load", "forward", "backward")[3 * number // length]
        if alive and draw.random() < frees:
            log.append(Event("free", alive.pop(draw.randrange(len(alive))), phase=phase))
        elif draw.random() < empties:
            log.append(Event("empty_cache", phase=phase))
        else:
            log.append(Event("alloc", number, draw.choice(sizes), 97 * draw.randrange(streams), phase))
            alive.append(number)
    return log


@pytest.mark.parametrize("expandable", [False, True], ids=["default", "expandable"])
def test_a_log_gives_as_a_program_what_it_gives_event_by_event(expandable: bool) -> None:
    draw = random.Random(7)
    config = AllocatorConfig(expandable_segments=expandable)
    for length in (3000, *(draw.randrange(300) for _ in range(60))):
        log = random_log(draw, length)
        whole = events_replayed(log, config)
        replayed = replay(*of_log(log), expandable=expandable)
        assert replayed.reserved == whole.peaks.reserved
        assert replayed.allocated == {phase: peaks.allocated for phase, peaks in whole.by_phase.items()}
        for part in (1, 0.9, 0.5):
            capacity = int(part * whole.peaks.reserved)
            runs = events_replayed(log, config, capacity_bytes=capacity).oom is None
            assert runs_within(*of_log(log), capacity, expandable=expandable) == runs


def layer(draw: random.Random, first: int, num_sizes: int) -> list[tuple[int, ...]]:
    """Tensors of one layer, numbered from `first`, that come and go; not always do all of them go."""
    events: list[tuple[int, ...]] = []
    alive: list[int] = []
    for number in range(first, first + draw.randint(1, 8)):
        events.append((OWN, number, draw.randrange(num_sizes), 1))
        alive.append(number)
        while alive and draw.random() < 0.5:
            events.append((END_OWN, alive.pop(draw.randrange(len(alive)))))
    return [*events, *((END_OWN, number) for number in alive[draw.random() < 0.1 :])]


def micro_batches(draw: random.Random) -> tuple[Program, list[int]]:
    """Some micro batches whose backwards are alike: each frees what its forward keeps. Between them something may change."""
    sizes = [draw.choice((300, 5000, MIB // 2, 3 * MIB, 11 * MIB, 30 * MIB)) + 512 * draw.randint(0, 9) for _ in range(6)]
    layers, kinds, kept = draw.randint(2, 6), draw.randint(1, 2), draw.randrange(len(sizes))
    forward = layer(draw, 10, len(sizes))
    backward = [layer(draw, 20 + 10 * kind, len(sizes)) for kind in range(kinds)]
    for events in backward:
        events.insert(draw.randint(0, len(events)), (FREE, 0, kept, 1))
    written: list[tuple[int, ...]] = [(PHASE, 0), *((TAKE, draw.randrange(len(sizes)), 1) for _ in range(5))]
    for number in range(draw.randint(2, 5)):
        moved = number * 50
        ours = [[(what, a + moved, *others) for what, a, *others in events] for events in (forward, *backward)]
        keeps = [(MAKE, moved + kind, kept, 1) for kind in range(kinds)]
        for kind, events in enumerate(ours[1:]):
            events[:] = [(what, moved + kind, *others) if what == FREE else (what, a, *others) for what, a, *others in events]
        written += [(PHASE, 1), (REPEAT, 1), (LAYER, layers, len(ours[0]) + kinds), *ours[0], *keeps]
        if draw.random() < 0.3:
            written.append((HOLD, number, draw.randrange(len(sizes))))
        if draw.random() < 0.1:
            at = next(at for at, event in enumerate(ours[1]) if event[0] == OWN)
            ours[1][at] = (OWN, ours[1][at][1], draw.randrange(len(sizes)), 1)
        written.append((PHASE, 2 + number))
        written += [(REPEAT, kinds), *(e for events in ours[1:] for e in ((LAYER, layers, len(events)), *events))]
    written.append((END,))
    numbers = array("q", chain.from_iterable((*event, 0, 0, 0, 0)[:5] for event in written))
    return Program(numbers.tobytes(), 300, 5, ("load", "forward", *(f"backward {number}" for number in range(5)))), sizes


@pytest.mark.parametrize("expandable", [False, True], ids=["default", "expandable"])
def test_micro_batches_alike_are_replayed_as_if_they_were_not(expandable: bool) -> None:
    """The compiled replay runs a backward again only where something is other than in the one before."""
    for seed in range(400):
        draw = random.Random(seed)
        written, sizes = micro_batches(draw)
        ties = draw.random() < 0.5
        once = interpret(written, sizes, expandable=expandable, ties_by_address=ties)
        assert replay(written, sizes, expandable=expandable, ties_by_address=ties) == once, seed
        capacity = once.reserved - 2 * MIB
        fits = runs_within(written, sizes, capacity, expandable=expandable, ties_by_address=ties)
        assert fits == interpreted_within(written, sizes, capacity, expandable=expandable, ties_by_address=ties), seed


def interpreted_within(written: Program, sizes: list[int], capacity: int, *, expandable: bool, ties_by_address: bool) -> bool:
    """As `runs_within`, by the allocator's model."""
    try:
        interpret(written, sizes, expandable=expandable, ties_by_address=ties_by_address, capacity=capacity)
    except MemoryError:
        return False
    return True


@pytest.mark.skipif(not program.GROWS, reason="no compiled replay was built")
def test_segments_that_grow_are_replayed_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, a 70B model takes 0.4 s."""
    monkeypatch.setattr(program, "interpret", None)
    assert replay(BY_HAND, SIZES, expandable=True).reserved == 42 * MIB


@pytest.mark.parametrize("nbytes", [2**57, 2**70])
def test_more_than_64_bits_hold(nbytes: int) -> None:
    assert replay(BY_HAND, (nbytes, *SIZES[1:])) == interpret(BY_HAND, (nbytes, *SIZES[1:]))


@pytest.mark.skipif(not program.COMPILED, reason="no compiled replay was built")
def test_both_replays_of_random_jobs_are_the_same() -> None:
    """More of them: tools/replay_jobs.py."""
    draw = random.Random(0)
    capped = []
    for number, (name, run) in enumerate(islice(runs(seed=0, largest=2e9), 40)):
        expandable = number % 8 == 7
        compiled, interpreted = both(run, expandable=expandable)
        assert compiled == interpreted, name
        assert compiled is not None
        limited = both(run, int(compiled.reserved * draw.uniform(0.9, 1.0)), expandable=expandable)
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


@pytest.mark.skipif(not program.COMPILED, reason="no compiled replay was built")
def test_a_program_that_was_read_before_is_checked_against_other_tables() -> None:
    before = replay(BY_HAND, SIZES)
    with pytest.raises(ValueError, match="names what is not in its tables"):
        replay(BY_HAND, SIZES[:1])
    with pytest.raises(ValueError, match="names what is not in its tables"):
        replay(BY_HAND._replace(storages=1), SIZES)
    assert replay(BY_HAND, SIZES) == before
