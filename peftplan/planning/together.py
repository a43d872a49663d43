"""Changes added one after another, each counted beside those before it: what helps where no few of them do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftplan.planning.attempts import tried
from peftplan.planning.changes import Change, Sizes

if TYPE_CHECKING:
    from peftplan.planning.trials import Trials


def together(trials: Trials, before: Sizes, singles: Sequence[Change], *, likely: int) -> Change | None:
    """The changes, the cheapest first, until the tensors take at most `likely` bytes, or all of them, without those that are not
    needed; None where they leave more than there is room for."""
    chosen: list[Change] = []
    whole = Change({}, 0, dict.fromkeys(before, 0))
    for change in sorted(singles, key=lambda change: (change.price, -max(change.saving.values()))):
        others = [other for other in chosen if not other.options.keys() & change.options.keys()]  # it replaces the rest
        if whole.left(before) <= likely or any(other.excludes(change) for other in others):
            continue
        added = _all(trials, before, [*others, change])
        if added is not None and added.left(before) < whole.left(before):
            chosen, whole = [*others, change], added
    enough = likely if whole.left(before) <= likely else trials.room
    for change in sorted(chosen, key=lambda change: -change.price):
        fewer = [other for other in chosen if other is not change]
        less = _all(trials, before, fewer)
        if less is not None and less.left(before) <= enough:
            chosen, whole = fewer, less
    return whole if chosen and whole.left(before) <= trials.room else None


def _all(trials: Trials, before: Sizes, changes: Sequence[Change]) -> Change | None:
    options = {name: value for change in changes for name, value in change.options.items()}
    return tried(trials, before, options, sum(change.price for change in changes)) if options else None
