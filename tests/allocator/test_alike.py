"""Programs that begin alike: replayed together as each of them alone."""

from __future__ import annotations

import random
from array import array

import pytest

from peftplan.allocator import alike, program
from peftplan.allocator.alike import replay_all
from peftplan.allocator.events import Event
from peftplan.allocator.program import (
    ADD,
    EMPTY,
    END,
    END_OUTPUTS,
    FREE,
    HOLD,
    LEAVE,
    LET_GO,
    MAKE,
    OUTPUTS,
    PHASE,
    TAKE,
    WIDTH,
    Program,
    interpret,
    of_log,
    replay,
)
from peftplan.units import MIB
from tests.allocator.test_program import BY_HAND, SIZES, micro_batches, random_log

compiled = pytest.mark.skipif(not program.COMPILED or not alike.MOST_ALIKE, reason="no compiled replay was built")


def beginning_alike(draw: random.Random) -> list[tuple[Program, list[int]]]:
    """Programs of one log that goes on in different ways, freeing what the beginning left."""
    begin = [event._replace(phase="load") for event in random_log(draw, draw.randrange(1, 300))]
    left = {event.id for event in begin if event.kind == "alloc"} - {event.id for event in begin if event.kind == "free"}
    logs = []
    for _ in range(draw.randint(2, 5)):
        end = random_log(draw, draw.randrange(1, 200))
        end = [event._replace(id=event.id + 1000, phase="step") if event.kind != "empty_cache" else event for event in end]
        frees = [Event("free", number, phase="step") for number in sorted(left) if draw.random() < 0.5]
        logs.append(of_log([*begin, *end, *frees]))
    most = [max(counts) for counts in zip(*((p.storages, p.handles, p.streams) for p, _ in logs), strict=True)]
    phases = max((p.phases for p, _ in logs), key=len)
    return [(p._replace(storages=most[0], handles=most[1], streams=most[2], phases=phases), sizes) for p, sizes in logs]


@pytest.mark.parametrize("expandable", [False, True], ids=["default", "expandable"])
def test_each_is_replayed_as_if_it_ran_alone(expandable: bool) -> None:
    for seed in range(60):
        draw = random.Random(seed)
        programs, ties = beginning_alike(draw), draw.random() < 0.5
        alone = [interpret(*each, ties_by_address=ties, expandable=expandable) for each in programs]
        assert replay_all(programs, ties_by_address=ties, expandable=expandable) == alone, seed


@compiled
def test_layers_may_be_repeated_before_and_behind_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "replay", None)  # none of them runs alone
    for seed in range(60):
        written, sizes = micro_batches(random.Random(seed))
        more = [written.events + BY_HAND.events[40 * first : 120] + written.events for first in range(3)]
        programs = [(written._replace(events=events), sizes) for events in more]
        assert replay_all(programs) == [interpret(*each) for each in programs], seed


@compiled
def test_programs_are_told_apart_by_the_sizes_of_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """5.5 MiB of the first are 6.5 of the second."""
    other = (13 * MIB // 2, *SIZES[1:])
    alone = [interpret(BY_HAND, sizes) for sizes in (SIZES, other)]
    monkeypatch.setattr(alike, "replay", None)
    assert replay_all([(BY_HAND, SIZES), (BY_HAND, other)]) == alone
    assert replay_all([(BY_HAND, SIZES)] * 2) == [alone[0]] * 2


def steps_of_ranks(draw: random.Random) -> list[tuple[Program, list[int]]]:
    """Programs of a few steps that part anywhere, and may end a step with the same blocks. Most storages are one tensor."""
    sizes = [draw.choice((0, 300, 5000, MIB // 2, 3 * MIB, 11 * MIB, 30 * MIB)) + 512 * draw.randint(0, 3) for _ in range(8)]
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(draw.randint(1, 6))]
    for _ in range(draw.randint(1, 4)):
        one_step = step(draw, 0, len(sizes))
        for events in ranks:
            parted = draw.choice((len(one_step), draw.randrange(len(one_step))))
            own = step(draw, draw.choice((40, 60)), len(sizes)) if draw.random() < 0.5 else one_step[parted:]
            events += one_step[:parted] + own
            events += [(LEAVE, draw.randrange(40))] * (draw.random() < 0.2) + [(END,)]
    programs = []
    for events in ranks:
        events += [(EMPTY,)] * (draw.random() < 0.2) + step(draw, 0, len(sizes))
        order = draw.sample(range(len(sizes)), len(sizes))  # ranks may number the same sizes in other ways
        integers = [n for event in events for n in (*_with_sizes(event, order), 0, 0, 0, 0)[:5]]
        table = [0] * len(sizes)
        for place, size in zip(order, sizes, strict=True):
            table[place] = size + draw.choice((0, 0, 0, 0, 512))
        programs.append((Program(array("q", integers).tobytes(), 100, 8, ("a", "b", "c"), 3), table))
    return programs


def step(draw: random.Random, first: int, num_sizes: int) -> list[tuple[int, ...]]:
    """Tensors that are made and freed, some by hand, in storages from `first` on: a few of which are more than one tensor."""
    events: list[tuple[int, ...]] = []
    alive: list[tuple[int, int, int]] = []
    for storage in range(first, first + draw.randint(1, 30)):
        what, size, stream = draw.random(), draw.randrange(num_sizes), draw.choice((0, 0, 0, 2))
        count = draw.choice((1, 1, 1, 1, 2))
        events.append((MAKE, storage, size, count, stream))
        alive.append((storage, size, count))
        if what < 0.1:
            events.append(draw.choice(((ADD, storage, size), (MAKE, storage, size, 1, 0), (OUTPUTS, storage), (END_OUTPUTS,))))
        elif what < 0.2:
            events.append(draw.choice(((PHASE, draw.randrange(3)), (HOLD, draw.randrange(8), size), (TAKE, size, 1))))
        elif what < 0.25:
            events += ((FREE, draw.randrange(first, first + 30), size, 1), (LET_GO, draw.randrange(8)))
        while alive and draw.random() < 0.45:
            events.append((FREE, *alive.pop(draw.randrange(len(alive)))))
    return [*events, *((FREE, *of) for of in alive[draw.randrange(len(alive) + 1) :])]


def _with_sizes(event: tuple[int, ...], order: list[int]) -> tuple[int, ...]:
    """An event whose size has another place in the table."""
    place = {TAKE: 1, HOLD: 2, MAKE: 2, ADD: 2, FREE: 2}.get(event[0])
    return event if place is None else (*event[:place], order[event[place]], *event[place + 1 :])


def _sound(events: bytes) -> bytes:
    """Without holding a handle twice, or letting one go that is not there."""
    integers, sound = array("q", events), array("q")
    taken: set[int] = set()
    for at in range(0, len(integers), WIDTH):
        what, handle = integers[at], integers[at + 1]
        if (what == HOLD and handle in taken) or (what == LET_GO and handle not in taken):
            continue
        taken ^= {handle} if what in (HOLD, LET_GO) else set()
        sound.extend(integers[at : at + WIDTH])
    return sound.tobytes()


@pytest.mark.parametrize("few", [0, 5, 800])
@pytest.mark.parametrize("expandable", [False, True], ids=["default", "expandable"])
def test_steps_of_ranks_that_part_and_meet_again(expandable: bool, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "FEW", few)
    for seed in range(few, few + 100):
        draw = random.Random(seed)
        ranks = [(program._replace(events=_sound(program.events)), sizes) for program, sizes in steps_of_ranks(draw)]
        ties = draw.random() < 0.5
        alone = [interpret(*each, ties_by_address=ties, expandable=expandable) for each in ranks]
        assert [replay(*each, ties_by_address=ties, expandable=expandable) for each in ranks] == alone, seed
        assert replay_all(ranks, ties_by_address=ties, expandable=expandable) == alone, seed
        changed = [(program, [n + 512 * draw.choice((0, 3)) for n in sizes]) for program, sizes in ranks]
        others = [interpret(*each, ties_by_address=ties, expandable=expandable) for each in changed]
        assert replay_all(changed, ties_by_address=ties, expandable=expandable) == others, seed


@compiled
def test_what_steps_share_is_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of which one has a tensor more in its first step, which goes with it."""
    monkeypatch.setattr(alike, "replay", None)
    first, more, second = [(MAKE, 1, 0, 1), (FREE, 1, 0, 1)], [(MAKE, 2, 1, 1), (FREE, 2, 1, 1)], [(MAKE, 3, 0, 2), (END,)]
    programs = []
    for events in ([*first, *first, (END,), *second], [*first, *more, (END,), *second]):
        integers = array("q", [n for event in ((PHASE, 0), *events) for n in (*event, 0, 0, 0, 0)[:5]])
        programs.append((Program(integers.tobytes(), 4, 0, ("step",)), SIZES))
    assert replay_all(programs) == [interpret(*each) for each in programs]
