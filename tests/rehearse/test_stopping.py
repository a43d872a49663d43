"""Early stopping on a card that computes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from peftplan.rehearse.inside import stopping


@pytest.mark.parametrize("watched", [False, True])
def test_a_metric_that_never_improves_ends_no_rehearsal(watched: bool) -> None:
    """transformers' own callback, which ends a run where nobody watches it."""
    transformers = pytest.importorskip("transformers")
    of = stopping.CHECKS["transformers.trainer_callback"]
    module = SimpleNamespace(EarlyStoppingCallback=type(of[0], (transformers.EarlyStoppingCallback,), {}))
    notes: list[str] = []
    if watched:
        stopping._go_on(module, say=notes.append, of=of)
    callback, control = module.EarlyStoppingCallback(2), transformers.TrainerControl()
    args = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    for _ in range(3):
        callback.on_evaluate(args, transformers.TrainerState(best_metric=0.0), control, {"eval_loss": 0.0})
    assert control.should_training_stop is not watched
    assert len(notes) == watched
