"""Callbacks that end a run early let it go on: a metric that reads as zero never improves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from peftplan.rehearse.inside.after_import import AfterImport

CHECKS = {
    "transformers.trainer_callback": ("EarlyStoppingCallback", "check_metric_value"),
    "lightning.pytorch.callbacks.early_stopping": ("EarlyStopping", "_run_early_stopping_check"),
    "pytorch_lightning.callbacks.early_stopping": ("EarlyStopping", "_run_early_stopping_check"),
}
"""Module → its callback and the method that compares a metric with the best one so far."""


def start(say: Callable[[str], None]) -> None:
    """Leave these comparisons out, once the program imports a callback. `say` is told of the first of a class."""
    sys.meta_path.insert(0, AfterImport({name: partial(_go_on, say=say, of=of) for name, of in CHECKS.items()}))


def _go_on(module: Any, *, say: Callable[[str], None], of: tuple[str, str]) -> None:
    name, method = of
    once = cache(say)

    def not_compared(self: Any, *args: Any, **kwargs: Any) -> None:
        once(f"{name} does not end the run: metrics read as zero, which never improves")

    setattr(getattr(module, name), method, not_compared)
