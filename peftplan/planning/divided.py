"""Plans that divide a model among GPUs, where the job as typed keeps the whole of it on each of them and does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from peftplan.planning.changes import OF_GPUS
from peftplan.planning.estimate import estimate
from peftplan.planning.for_method import job_options, options_for
from peftplan.results.advice import FITS

if TYPE_CHECKING:
    from peftplan.planning.fit_result import Plan
    from peftplan.planning.plans import Options


def divided(model: object, gpu: str, typed: Mapping[str, object], misses: Iterable[Plan], smallest: Options) -> Iterator[Options]:
    """What makes plans that do not fit under DDP fit over the same GPUs, by another strategy: as `advice` finds it.

    `smallest`: the size at which nothing fits. Nothing where the user chose the strategy.
    """
    if typed.get("strategy") is not None:
        return
    for miss in misses:
        if miss.assumptions.get("strategy") != "ddp":
            continue
        changed = {**typed, **miss.changes}
        options = options_for(miss.method, changed) if "method" in miss.changes else changed
        result = estimate(model, gpu=gpu, **job_options(options, smallest))
        for row in (row for advised in result.advice.values() for row in advised.changes):
            if row.verdict in FITS and "strategy" in row.options and not {"method", "seq_len", *OF_GPUS} & row.options.keys():
                yield {**miss.changes, **row.options}
                break
