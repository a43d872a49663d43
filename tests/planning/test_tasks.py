"""What has no loss, or a trainer or loss of another kind of model: both engines give one reason."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.errors import RefusedError

REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("bart-base", {"trainer": "trl"}, "trainer: SFTTrainer of trl 1.16 trains causal language models, not BartForConditional"),
    ("bert-base-cased", {"trainer": "trl"}, "not BertForMaskedLM; accepted: transformers, plain, qlora-paper"),
    ("llama-3.2-1b", {"trainer": "trl", "task_type": "SEQ_CLS"}, "not LlamaForSequenceClassification"),
    ("t5-small", {"loss": "liger"}, "loss: liger replaces the loss of causal language models, not of T5ForConditional"),
)


@pytest.mark.parametrize("engine", ["analytic", "trace"])
@pytest.mark.parametrize(("model", "options", "reason"), REFUSED)
def test_both_engines_refuse_at_the_door(model: str, options: dict[str, Any], reason: str, engine: Any) -> None:
    with pytest.raises(RefusedError) as refused:
        estimate(model, engine=engine, method="full", seq_len=64, **options)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("deberta-v3-base", "task_type: DebertaV2Model has no loss to train on; accepted: MASKED_LM, SEQ_CLS, TOKEN_CLS, QUEST"),
        ("vit-base-patch16-224-in21k", "task_type: ViTModel has no loss to train on; accepted: IMAGE_CLS"),
    ],
)
def test_a_model_without_a_loss_has_counts_and_no_peak(model: str, reason: str) -> None:
    found = estimate(model, method="full", seq_len=64)
    assert (found.peaks, found.trainable_parameters > 0) == (None, True)
    assert found.not_modelled[0].startswith(reason)
    with pytest.raises(RefusedError) as refused:
        estimate(model, engine="trace", method="full", seq_len=64)
    assert str(refused.value).startswith(reason)


@pytest.mark.parametrize(
    ("model", "task"), [("deberta-v3-base", "SEQ_CLS"), ("vit-base-patch16-224-in21k", "IMAGE_CLS"), ("t5-small", None)]
)
def test_an_accepted_task_has_peaks(model: str, task: str | None) -> None:
    assert estimate(model, method="full", task_type=task, seq_len=64).peaks is not None


def test_a_bare_model_with_a_loss_of_its_own_is_left_to_the_trace() -> None:
    assert estimate("clip-vit-base-patch16", method="full").peaks is None
