"""Which evaluations have a formula: those that were rehearsed (tests/rehearse/evaluated.jsonl)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from peftplan.job.trainer import TrainerName

if TYPE_CHECKING:
    from peftplan.job.job import Job

Strategies = tuple[str | None, ...]
"""None: one GPU."""
REHEARSED: Mapping[TrainerName, Strategies] = MappingProxyType(
    {"transformers": (None, "ddp", "fsdp2"), "trl": (None, "ddp", "fsdp2"), "trl-dpo": (None, "ddp")}
)
"""Trainer → the strategies under which its evaluation was rehearsed."""


LOSSES = ("full", "trl-chunked")
"""Losses with which they were."""


def without_formula(job: Job) -> str | None:
    """What evaluation of a job has no formula; None where its peak is counted."""
    setup, distributed = job.setup, job.distributed
    plain = job.is_full_or_lora and setup.loss in LOSSES and not setup.kernels and not setup.router_loss
    if plain and (None if distributed is None else distributed.strategy) in REHEARSED.get(setup.trainer, ()):
        return None
    return f"an evaluation of {setup.by.called}{'' if distributed is None else f' with {distributed.called}'}"
