"""One rank of several GPUs in a trace, by strategy: what it does otherwise than one GPU (`one_gpu`)."""

from __future__ import annotations

from importlib import import_module

from peftplan.distributed.strategy import Distributed
from peftplan.trace.followed import RANKS
from peftplan.trace.ranks.one_gpu import OneGpu


def rank_of(distributed: Distributed | None, rank: int = 0) -> OneGpu:
    """What is traced of this strategy, on this rank; None is one GPU."""
    if distributed is None:
        return OneGpu()
    module, _, name = RANKS[distributed.strategy].partition(".")
    of_strategy: type[OneGpu] = getattr(import_module(f"{__name__}.{module}"), name)
    of_rank = of_strategy(distributed)  # type: ignore[call-arg]
    of_rank.rank = rank
    return of_rank
