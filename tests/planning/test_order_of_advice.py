"""In which order changes are tried and shown: each test fails where one part of a sort's key is left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from peftplan.planning.changes import CLOSE, OTHER, SAME, Change, combinations
from tests.planning.test_advice import Trying, names


def test_of_single_changes_the_cheapest_that_suffices_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(Trying({"dear": (OTHER, 30), "cheap": (SAME, 21)}, room=80).advise(monkeypatch))[0] == "cheap"


def test_of_equal_prices_that_which_leaves_less_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(Trying({"some": (SAME, 21), "more": (SAME, 25)}, room=80).advise(monkeypatch))[0] == "more"


def test_of_equal_prices_one_change_comes_before_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both cost 2; the two together leave less."""
    changes = {"one": (2 * SAME, 22), "a": (SAME, 12), "b": (SAME, 12)}
    assert names(Trying(changes, room=80).advise(monkeypatch))[0] == "one"


def test_what_likely_fits_is_tried_before_what_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator holds 20 beside 100 of tensors; a quarter of that, 3.9 beside 76.1, has to be left of the 80."""
    trying = Trying({"cheap": (SAME, 22), "sure": (OTHER, 45)}, room=80, besides=20)
    assert names(trying.advise(monkeypatch))[0] == "sure"
    assert trying.replays[0] == {"sure": True}


def test_what_fits_comes_before_what_is_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tight(Trying):
        def judged(self, **options: Any) -> Any:
            result = super().judged(**options)
            (on_card,) = result.gpus
            tight = SimpleNamespace(verdict="tight", headroom_bytes=on_card.headroom_bytes)
            return result if on_card.headroom_bytes > 5 else SimpleNamespace(gpus=(tight,), peaks=result.peaks)

    changes = {"cheap": (SAME, 22), "dear": (OTHER, 40)}
    assert names(Tight(changes, room=80).advise(monkeypatch))[0] == "dear"
    everything = Tight(changes, room=80).advise(monkeypatch, everything=True)
    assert [change.verdict for change in everything.changes[:2]] == ["fits", "tight"]


def test_where_nothing_suffices_what_saves_most_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"less": (SAME, 12), "most": (OTHER, 18), "least": (SAME, 9)}
    assert names(Trying(changes, room=30).advise(monkeypatch)) == ["most", "less", "least"]


def test_combinations_go_by_price_and_then_by_what_they_leave() -> None:
    before = {"forward": 50, "backward": 100}
    prices = {"a": (SAME, 12), "b": (SAME, 9), "c": (SAME, 11), "d": (CLOSE, 19)}
    changes = [Change({name: True}, price, {"forward": 0, "backward": saving}) for name, (price, saving) in prices.items()]
    # a + b saves 21, a + c 23, b + c 20 for 2; d beside one of them 31, 28 and 30 for 3
    ordered = ["+".join(change.options) for change in combinations(changes, before, 80)]
    assert ordered == ["a+c", "a+b", "b+c", "a+d", "c+d", "b+d"]
