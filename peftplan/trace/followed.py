"""What a trace follows of a job, and what it leaves to the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import peftplan.versions as versions
from peftplan.distributed.layout import ACCELERATE
from peftplan.errors import RefusedError
from peftplan.job.job import Job
from peftplan.optim import parse_optim
from peftplan.storage.config import FOUR_BIT

if TYPE_CHECKING:
    from peftplan.distributed.strategy import Distributed


def check_followed(job: Job) -> None:
    """Raise RefusedError for a job that no trace follows."""
    by, distributed = job.setup.by, job.distributed
    if by.own_modules:
        raise RefusedError(f"engine: trace runs models of transformers, not those of {by.called}; accepted: analytic")
    if by.of_preferences:
        raise RefusedError(f"engine: trace follows a step of one forward, not that of {by.called}; accepted: analytic")
    if by.weighs_tokens or job.setup.loss == "per-token":
        raise RefusedError(f"engine: trace follows losses of models, not one that {by.called} makes; accepted: analytic")
    if distributed is not None and (unknown := _unknown_to_rank(job, distributed)):
        raise RefusedError(f"engine: trace follows one GPU and FSDP2, not {unknown}; accepted: analytic")


def _unknown_to_rank(job: Job, distributed: Distributed) -> str | None:
    """What of a job over several GPUs no trace follows, in words; None if it follows all."""
    unknown = {
        distributed.called: distributed.strategy != "fsdp2",
        "its tp_size": distributed.tp_size not in (None, 1),
        "its cp_size": distributed.cp_size not in (None, 1),
        f"its units under accelerate {distributed.accelerate}": versions.FSDP2_TAIL_APART.after(distributed.accelerate),
        f"its units under {job.setup.by.called}": job.setup.by.layout is not ACCELERATE,
        f"its shards in {job.quant.name if job.quant else None}": job.quant is not None and job.quant.name not in FOUR_BIT,
        f"its {job.setup.optim}": parse_optim(str(job.setup.optim)).step_implementation == "kernel",
    }
    return next((what for what, is_so in unknown.items() if is_so), None)
