"""What a model's task leaves to train: refused before any engine looks at a job, with one reason for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftplan.arch import sources
from peftplan.arch.adapters import ADAPTERS
from peftplan.arch.heads import TASK_TYPES
from peftplan.arch.modules import Architecture
from peftplan.errors import PeftplanError, RefusedError
from peftplan.planning.setup import PRESETS, Setup

BARE = "FEATURE_EXTRACTION"
CAUSAL = "CAUSAL_LM"


def check_task(model: Any, architecture: Architecture, setup: Setup) -> None:
    """Raise RefusedError for a model without a loss, and for a trainer or a loss that only causal language models have.

    `setup` is resolved. A bare model that has no adapter here can have a loss of its own (CLIP): only the trace knows.
    """
    task, found = architecture.task_type, architecture.model_class
    if task == BARE and architecture.model_type in ADAPTERS:
        raise RefusedError(f"task_type: {found} has no loss to train on; accepted: {', '.join(_with_loss(model))}")
    if task == CAUSAL:
        return
    if setup.trainer == "trl":
        others = ", ".join(name for name in PRESETS if name != "trl")
        raise RefusedError(f"trainer: SFTTrainer of trl 1.16 trains causal language models, not {found}; accepted: {others}")
    if setup.loss != "full":
        raise RefusedError(f"loss: {setup.loss} replaces the loss of causal language models, not of {found}; accepted: full")


def _with_loss(model: Any) -> Iterator[str]:
    """The tasks that transformers has a class for, of this model's type."""
    for task in TASK_TYPES:
        try:
            if task != BARE and sources.load(model, task_type=task):
                yield task
        except PeftplanError:
            continue
