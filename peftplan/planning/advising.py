"""`advice`: what would make a job fit the cards that it does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.errors import BoundError, UnknownNameError
from peftplan.results.estimate import Estimate
from peftplan.results.verdict import Verdict

if TYPE_CHECKING:
    from peftplan.results.advice import Advised


def advice(estimate: Estimate, *, gpu: str | None = None) -> dict[str, Advised]:
    """Find what would make the job fit: card → changes, each with what it saves.

    A card that the job fits has no entry, nor has a card whose verdict is `unknown`. The first change makes the job fit, if any
    does; the others are ordered by what they save. `gpu` selects one card of the estimate. Changes are computed by formulas,
    whichever engine gave the verdict; `estimate(..., advice="all")` searches all combinations.

    Raises UnknownNameError for a card that is not one of the estimate's.
    """
    if not isinstance(estimate, Estimate):
        raise BoundError("estimate", estimate, "an Estimate")
    cards = [verdict.gpu for verdict in estimate.gpus]
    if gpu is not None and gpu not in cards:
        raise UnknownNameError("gpu", gpu, cards)
    return {verdict.gpu: advice_on(estimate, verdict) for verdict in unfit(estimate) if gpu in (None, verdict.gpu)}


def unfit(estimate: Estimate) -> tuple[Verdict, ...]:
    """The cards that the job does not fit, the nearest first; none where there is no job or no peak to change."""
    if estimate.origin is None or estimate.peaks is None:
        return ()
    verdicts = [verdict for verdict in estimate.gpus if verdict.verdict == "does_not_fit"]
    return tuple(sorted(verdicts, key=lambda verdict: -verdict.headroom_bytes))


def advice_on(estimate: Estimate, verdict: Verdict) -> Advised:
    """What to change for one card of `unfit`; savings of a formula are counted from the peak that the estimate states."""
    assert estimate.origin is not None
    assert estimate.peaks is not None
    advised = estimate.origin.advise(verdict)
    if estimate.bound in ("at_least", "unknown"):
        advised = advised.uncertain()
    return advised.saving_from(estimate.peaks.allocated) if estimate.engine == "analytic" else advised
