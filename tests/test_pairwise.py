"""The pairwise matrix on a product whose pairs can be counted."""

from __future__ import annotations

from itertools import product

from tests.pairwise import covering, pairs

SIZES = {"model": 5, "method": 4, "option": 3, "task": 2}
PRODUCT = [dict(zip(SIZES, values, strict=True)) for values in product(*map(range, SIZES.values()))]


def test_every_two_values_meet_in_few_cases() -> None:
    assert len(PRODUCT) == 120  # 5 · 4 · 3 · 2
    some = covering(PRODUCT, lambda case: case)
    met = set().union(*map(pairs, some))
    assert len(met) == 5 * 4 + 5 * 3 + 5 * 2 + 4 * 3 + 4 * 2 + 3 * 2
    assert 5 * 4 <= len(some) <= 24  # no fewer than the two largest factors have pairs
    assert some == [case for case in PRODUCT if case in some]


def test_a_pair_that_never_meets_is_not_asked_for() -> None:
    """Cases may lack a factor, and combinations may be missing."""
    cases: list[dict[str, str | int]] = [{"model": "a"}, {"model": "a", "r": 1}, {"model": "b", "r": 2}]
    assert covering(cases, lambda case: case) == cases[1:]


def test_all_of_two_factors_is_their_product() -> None:
    cases = [{"model": model, "r": r} for model in "ab" for r in (1, 2)]
    assert covering(cases, lambda case: case) == cases
