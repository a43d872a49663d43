"""The pairwise matrix: of all combinations of many factors, so few that any two values still meet."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from typing import TypeVar

Case = TypeVar("Case")
Value = tuple[str, Hashable]


def pairs(factors: Mapping[str, Hashable]) -> set[tuple[Value, Value]]:
    """Each two of a case's factors with their values, in one order whatever the mapping's."""
    return set(combinations(sorted(factors.items(), key=lambda value: value[0]), 2))


def covering(cases: Sequence[Case], factors: Callable[[Case], Mapping[str, Hashable]]) -> list[Case]:
    """Cases, in their order, in which every two values meet that meet in one of all `cases`.

    `factors`: name → value of what a case varies. Greedy: next comes the case with the most pairs that none before it has; of
    several the first. The same cases give the same answer in every process.
    """
    missing = {number: pairs(factors(case)) for number, case in enumerate(cases)}
    met: set[tuple[Value, Value]] = set()
    chosen: list[int] = []
    queue = [(-len(new), number) for number, new in missing.items()]
    heapq.heapify(queue)
    while queue:
        expected, number = heapq.heappop(queue)
        missing[number] -= met
        if not missing[number]:
            continue
        if len(missing[number]) == -expected:
            chosen.append(number)
            met |= missing[number]
        else:
            heapq.heappush(queue, (-len(missing[number]), number))
    return [cases[number] for number in sorted(chosen)]
