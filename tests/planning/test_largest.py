"""The search for the largest size, on made-up needs whose answer is counted by hand."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from peftplan.planning.largest import MOST_ASKED, MOST_BEYOND, Largest, Probe, largest
from peftplan.units import MIB


def needing(reserved: Callable[[int], int], *, room: int) -> Callable[[int], Probe]:
    return lambda size: Probe(reserved(size) <= room, min(reserved(size), size * MIB), reserved(size), room)


@pytest.mark.parametrize(("room", "size"), [(0, 0), (1, 1), (2, 2), (999, 999), (1000, 1000), (4096, 1000)])
def test_where_reserved_bytes_grow_with_every_size(room: int, size: int) -> None:
    answer = largest(needing(lambda n: n * MIB, room=room * MIB), ceiling=1000)
    assert (answer.size, answer.bounded, answer.again) == (size, size == 1000 and room >= 1000, None)


def test_a_size_that_does_not_lies_below_larger_ones_that_do() -> None:
    """10 MiB a size, of 1,000; size 70 alone takes 400 more. Bisection asks 64, 96 and 100, not 70, which is one of the 32 below.
    The drop of 390 MiB from 70 to 71 is then granted twice: 22 is the first that leaves 780."""
    answer = largest(needing(lambda n: (10 * n + 400 * (n == 70)) * MIB, room=1000 * MIB), ceiling=1000)
    assert answer == Largest(69, 22, again=100)


def test_a_few_sizes_are_all_asked() -> None:
    """Batches of which 13 and 14 need more than 15 and 16: 16 leaves more than the drops that bisection saw."""
    need = {13: 18.4, 14: 19.8, 15: 16.8, 16: 17.8}
    answer = largest(needing(lambda n: int(need.get(n, 1.3 * n) * 1024) * MIB, room=int(18.2 * 1024) * MIB), ceiling=1000)
    assert answer == Largest(12, 1, again=16)


def test_every_size_is_asked_where_it_is_close() -> None:
    """Of 10,000 MiB at 1 MiB a size, 2 × 128 MiB below the edge count as close; what is below is not asked."""
    probed: list[int] = []

    def probe(size: int) -> Probe:
        probed.append(size)
        return Probe(size <= 10_000, size * MIB, size * MIB, 10_000 * MIB)

    answer = largest(probe, ceiling=2**20)
    assert answer == Largest(10_000, 10_000 - 256)
    assert set(range(10_000 - 256, 10_002)) <= set(probed)
    assert len(probed) == len(set(probed)) < 256 + 40


def test_it_stops_asking_where_sizes_are_cheap() -> None:
    """1 KiB a size: the close ones would be 262,144."""
    answer = largest(needing(lambda n: n * 1024, room=2**30), ceiling=2**30)
    assert answer == Largest(2**20, 2**20 + 1 - MOST_ASKED)


def test_a_size_that_was_not_asked_is_never_the_answer() -> None:
    """Sizes 101 to 800 do not, and 801 to 1,000 do again: bisection ends at 1,000; only 300 are asked one by one."""
    probed: set[int] = set()

    def probe(size: int) -> Probe:
        probed.add(size)
        return Probe(size <= 100 or 800 < size <= 1000, size * MIB, (900 if 100 < size <= 800 else 100) * MIB, 150 * MIB)

    answer = largest(probe, ceiling=1000, most_asked=300)
    assert {answer.size, answer.size + 1} <= probed
    assert (probe(answer.size).accepted, probe(answer.size + 1).accepted) == (True, False)


@pytest.mark.parametrize("seed", range(40))
def test_against_asking_every_size(seed: int) -> None:
    """Needs that grow by 1 to 40 MiB a size and scatter by up to 100: what the definition says, by counting."""
    draw = random.Random(seed)
    step = draw.randint(1, 40)
    needs = [0] + [n * step + draw.randint(0, 100) for n in range(1, 4000)]
    room = draw.randint(200, 3000 * step)
    accepted = [need <= room for need in needs]
    expected = next(n for n in range(1, 4000) if not accepted[n]) - 1
    answer = largest(needing(lambda n: needs[n] * MIB, room=room * MIB), ceiling=3999)
    assert answer.size == expected
    beyond = [n for n in range(expected + 2, min(expected + 2 + MOST_BEYOND, 4000)) if accepted[n]]
    assert answer.again == max(beyond, default=None)
