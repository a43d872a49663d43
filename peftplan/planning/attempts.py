"""A change that is tried on a job: what it saves by formulas, and its verdict once it is replayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftplan.errors import PeftplanError
from peftplan.planning.changes import Change, Sizes
from peftplan.results.advice import FITS, Advice
from peftplan.results.verdict import TIGHT

if TYPE_CHECKING:
    from peftplan.planning.trials import Trials


def sizes_of(trials: Trials, options: Mapping[str, object]) -> Sizes | None:
    """The sizes with some options changed; None if they do not go with the job or have no formulas."""
    try:
        return trials.sizes(**options)
    except PeftplanError:
        return None


def tried(trials: Trials, before: Sizes, options: Mapping[str, object], price: int) -> Change | None:
    after = sizes_of(trials, options)
    return None if after is None else Change.between(before, after, options, price)


def judged(trials: Trials, before: Sizes, change: Change) -> Advice | None:
    try:
        result = trials.judged(**change.options)
    except PeftplanError:
        return None
    (on_card,) = result.gpus
    peak, word = (result.peaks.allocated if result.peaks else None), on_card.verdict
    if trials.lower_bound and result.peaks is not None and result.peaks.incomplete and on_card.headroom_bytes >= 0:
        # the verdict of the counted part; `Advised.uncertain` says that it is a lower bound
        word = "fits" if on_card.headroom_bytes >= TIGHT * on_card.usable_bytes else "tight"
    return row_of(trials, before, change)._replace(verdict=word, peak_allocated=peak, headroom_bytes=on_card.headroom_bytes)


def row_of(trials: Trials, before: Sizes, change: Change) -> Advice:
    left = change.left(before)
    verdict = "does_not_fit" if left > trials.room else None
    return Advice(dict(change.options), max(before.values()) - left, left, verdict)


def as_good(trials: Trials, before: Sizes, options: Mapping[str, object], row: Advice) -> Advice | None:
    """The row of other options, if their verdict is as good."""
    change = tried(trials, before, options, 0) if options and options != row.options else None
    other = judged(trials, before, change) if change is not None and change.left(before) <= trials.room else None
    return other if other is not None and other.verdict in FITS[: FITS.index(str(row.verdict)) + 1] else None
