"""Plans that divide a model among GPUs, where each of them, or the only one, is too small for the whole of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from peftplan.errors import PeftplanError
from peftplan.planning.changes import OF_GPUS
from peftplan.planning.estimate import estimate
from peftplan.planning.for_method import job_options, options_for
from peftplan.results.advice import FITS

if TYPE_CHECKING:
    from peftplan.planning.fit_result import Plan
    from peftplan.planning.plans import Options
    from peftplan.results.estimate import Estimate


def divided(model: object, gpu: str, typed: Mapping[str, object], misses: Iterable[Plan], smallest: Options) -> Iterator[Options]:
    """What makes plans that do not fit under DDP fit over the same GPUs, by another strategy, and the job as typed on one GPU
    over several: as `advice` finds it.

    `smallest`: the size at which nothing fits. Nothing where the user chose the strategy.
    """
    if typed.get("strategy") is not None:
        return
    for miss in misses:
        strategy = miss.assumptions.get("strategy")
        if strategy is None and not miss.changes:
            result = estimate(model, gpu=gpu, **job_options(typed, smallest))
            yield from (row.several_gpus.options for row in result.advice.values() if row.several_gpus is not None)
        if strategy != "ddp":
            continue
        changed = {**typed, **miss.changes}
        options = options_for(miss.method, changed) if "method" in miss.changes else changed
        result = estimate(model, gpu=gpu, **job_options(options, smallest))
        if changes := next(_changes(result), None) or _strategy(model, gpu, options, smallest):
            yield {**miss.changes, **changes}


def _changes(result: Estimate) -> Iterator[Options]:
    """What advice found: changes that fit, of the strategy and no other size."""
    for row in (row for advised in result.advice.values() for row in advised.changes):
        if row.verdict in FITS and "strategy" in row.options and not {"method", "seq_len", *OF_GPUS} & row.options.keys():
            yield row.options


def _strategy(model: object, gpu: str, options: Mapping[str, object], smallest: Options) -> Options | None:
    """The strategy alone, where a job is tight, for which nothing is advised."""
    for strategy in ("fsdp2", "zero3"):
        with suppress(PeftplanError):
            (verdict,) = estimate(model, gpu=gpu, **job_options({**options, "strategy": strategy}, smallest)).gpus
            if verdict.verdict == "fits":
                return {"strategy": strategy}
    return None
