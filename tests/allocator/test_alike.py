"""Programs that begin alike: replayed together as each of them alone."""

from __future__ import annotations

import random

import pytest

from peftplan.allocator import alike, program
from peftplan.allocator.alike import replay_all
from peftplan.allocator.events import Event
from peftplan.allocator.program import Program, interpret, of_log
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
    """5.5 MiB of the first are 6.5 of the second, so that these run alone."""
    other = (13 * MIB // 2, *SIZES[1:])
    alone = [interpret(BY_HAND, sizes) for sizes in (SIZES, other)]
    assert replay_all([(BY_HAND, SIZES), (BY_HAND, other)]) == alone
    monkeypatch.setattr(alike, "replay", None)
    with pytest.raises(TypeError):
        replay_all([(BY_HAND, SIZES), (BY_HAND, other)])
    assert replay_all([(BY_HAND, SIZES)] * 2) == [alone[0]] * 2
