"""How many GPUs a job needs: the fewest over which it fits, as it is or beside other changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from peftplan.planning.attempts import as_good, judged, tried
from peftplan.planning.changes import MORE_GPUS, OF_GPUS, Change, Sizes, more_gpus, several_gpus
from peftplan.results.advice import FITS, Advice

if TYPE_CHECKING:
    from peftplan.job.job import Job
    from peftplan.planning.trials import Trials


def fewest_gpus(job: Job, trials: Trials, before: Sizes, singles: Sequence[Change], fitting: Sequence[Advice]) -> list[Advice]:
    """The smallest number of GPUs, doubled each time, over which the job fits as it is; none if `fitting` has one already.
    More than eight times as many are tried where these are too few."""
    if any(OF_GPUS & row.options.keys() for row in fitting):
        return []
    few = sorted((change for change in singles if change.options.keys() <= OF_GPUS), key=lambda change: change.price)
    most = few and few[-1].left(before) > trials.room
    many = _over_machines(job, trials, before) if most else ()
    enough = (change for change in chain(few, many) if change.left(before) <= trials.room)
    rows = (judged(trials, before, change) for change in enough)
    return list(islice((row for row in rows if row is not None and row.verdict in FITS), 1))


def _over_machines(job: Job, trials: Trials, before: Sizes) -> Iterator[Change]:
    """The job over 16, 32 and 64 times the GPUs."""
    for times in (16, 32, 64):
        options = {} if job.distributed is None else more_gpus(job.distributed, times)
        if options and (change := tried(trials, before, options, MORE_GPUS)) is not None:
            yield change


def several(job: Job, trials: Trials, before: Sizes) -> Advice | None:
    """The fewest GPUs of the card over which a job of one GPU fits, if any without releasing cached memory; None if none does, or
    without formulas."""
    if job.distributed is not None or not trials.in_numbers:
        return None
    weights, tight = trials.weights(), None
    for options in several_gpus(job):
        ranks = math.prod(value for name, value in options.items() if name in OF_GPUS and isinstance(value, int))
        if weights > ranks * trials.room:
            continue
        change = tried(trials, before, options, MORE_GPUS)
        if change is None:
            return None
        row = judged(trials, before, change) if change.left(before) <= trials.room else None
        if row is None or row.verdict not in FITS:
            continue
        if (row.headroom_bytes or 0) >= 0:
            return row
        tight = tight or row
    return tight


def spared(job: Job, trials: Trials, before: Sizes, singles: Sequence[Change], row: Advice) -> Advice:
    """The row without those of its changes that it fits as well without, and over the fewest GPUs: savings that are added up are
    more or less than those of the changes together."""
    for change in sorted(singles, key=lambda change: -change.price):
        if not change.options.keys() <= row.options.keys():
            continue
        others = {name: value for name, value in row.options.items() if name not in change.options}
        fewer = (more_gpus(job.distributed, times) for times in (2, 4) if job.distributed and change.options.keys() <= OF_GPUS)
        rows = (as_good(trials, before, {**options, **others}, row) for options in ({}, *fewer))
        row = next((other for other in rows if other is not None), row)
    return row
