"""What has no loss, or a trainer or loss of another kind of model: both engines give one reason."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.errors import RefusedError
from peftplan.job.sources import load_config
from peftplan.job.tasks import WITH_PAD_TOKEN
from tests.memory.engines import TOLERANCE, phases, shallow

REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("bart-base", {"trainer": "trl"}, "trainer: SFTTrainer of trl 1.16 trains causal language models, not BartForConditional"),
    (
        "bert-base-cased",
        {"trainer": "trl"},
        "not BertForMaskedLM; accepted: transformers, llamafactory, llamafactory-partial, axolotl, swift-text-part, plain",
    ),
    ("llama-3.2-1b", {"trainer": "trl", "task_type": "SEQ_CLS"}, "not LlamaForSequenceClassification"),
    ("t5-small", {"loss": "liger"}, "loss: liger replaces the loss of causal language models, not of T5ForConditional"),
)


@pytest.mark.parametrize("engine", ["analytic", "trace"])
@pytest.mark.parametrize(("model", "options", "reason"), REFUSED)
def test_both_engines_refuse_at_the_door(model: str, options: dict[str, Any], reason: str, engine: Any) -> None:
    with pytest.raises(RefusedError) as refused:
        estimate(model, engine=engine, method="full", seq_len=64, **options)
    assert reason in str(refused.value)


def test_cut_cross_entropy_of_scaled_logits_has_counts_and_no_peak() -> None:
    job: dict[str, Any] = {"method": "full", "seq_len": 64, "loss": "cut-cross-entropy"}
    result = estimate("aya-23-8b", **job)
    assert (result.peaks, result.total_parameters) == (None, 8_028_033_024)
    assert result.not_modelled[0].startswith("cut-cross-entropy of cohere, whose logits are scaled")
    with pytest.raises(RefusedError, match="trace scales no logits of cut cross entropy"):
        estimate("aya-23-8b", engine="trace", **job)


@pytest.mark.parametrize("engine", ["analytic", "trace"])
def test_both_engines_refuse_the_dtype_that_a_kernel_asserts(engine: Any) -> None:
    """A trace asks for torch before it knows the dtypes."""
    pytest.importorskip("torch")
    with pytest.raises(RefusedError, match="asserts hidden states and a head in 16 bits"):
        estimate("qwen2.5-0.5b", engine=engine, method="full", seq_len=64, loss="cut-cross-entropy", dtype="fp32")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("deberta-v3-base", "task_type: DebertaV2Model has no loss to train on; accepted: MASKED_LM, SEQ_CLS, TOKEN_CLS, QUEST"),
        ("vit-base-patch16-224-in21k", "task_type: ViTModel has no loss to train on; accepted: IMAGE_CLS"),
    ],
)
def test_a_model_without_a_loss_has_counts_and_no_peak(model: str, reason: str) -> None:
    result = estimate(model, method="full", seq_len=64)
    assert (result.peaks, result.trainable_parameters > 0) == (None, True)
    assert result.not_modelled[0].startswith(reason)
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


def notes(model: Any, **options: Any) -> str:
    """The notes of an estimate, in one text."""
    return "; ".join(estimate(model, **options).assumptions.get("notes", ()))


@pytest.mark.parametrize("model", ["llama-3.2-1b", "gpt2", "bloom-560m"])
def test_a_classifier_without_a_pad_token_is_counted_with_one(model: str) -> None:
    """transformers' class raises for two sequences until the user sets one: both engines count what users then get."""
    pytest.importorskip("torch")
    job: dict[str, Any] = {"method": "full", "task_type": "SEQ_CLS", "batch_size": 2, "seq_len": 64}
    config = shallow(model, 2)
    assert phases(config, "analytic", **job) == {
        phase: pytest.approx(nbytes, rel=TOLERANCE) for phase, nbytes in phases(config, "trace", **job).items()
    }
    for engine in ("analytic", "trace"):
        assert "set model.config.pad_token_id (counted as set)" in notes(config, engine=engine, **job)


def test_a_pad_token_is_noted_only_where_one_is_missing() -> None:
    """Classes of one sequence need none, Gemma's config class has one, BERT reads its first token."""
    job: dict[str, Any] = {"method": "full", "task_type": "SEQ_CLS", "seq_len": 64}
    assert "pad_token_id" in notes("llama-3.2-1b", batch_size=2, **job)
    assert "pad_token_id" not in notes("llama-3.2-1b", batch_size=1, **job)
    assert "pad_token_id" not in notes({**load_config("llama-3.2-1b"), "pad_token_id": 4}, batch_size=2, **job)
    without = {key: value for key, value in load_config("gemma-2b").items() if key != "pad_token_id"}
    assert "pad_token_id" not in notes(without, batch_size=2, **job)
    assert "pad_token_id" in notes({**without, "pad_token_id": None}, batch_size=2, **job)
    assert "pad_token_id" not in notes("bert-base-cased", batch_size=2, **job)


def test_config_classes_with_a_pad_token_are_transformers() -> None:
    pytest.importorskip("torch")
    from transformers import CONFIG_MAPPING

    for model_type in WITH_PAD_TOKEN:
        assert CONFIG_MAPPING[model_type]().get_text_config().pad_token_id is not None, model_type
    for model_type in ("llama", "gpt2", "bloom", "falcon", "qwen2", "qwen3", "mistral", "mixtral", "phi", "gpt_neox"):
        assert CONFIG_MAPPING[model_type]().pad_token_id is None


def test_options_of_tokens_are_said_to_be_unused_by_a_model_of_pictures() -> None:
    model = "vit-base-patch16-224"
    text = notes(model, seq_len=77, padding=True)
    assert "seq_len is not used: ViTForImageClassification reads images" in text
    assert "padding is not used" in text
    assert "not used" not in notes(model, batch_size=4)
    assert "not used" not in "; ".join(estimate(model).at(batch_size=4).assumptions.get("notes", ()))
    assert "not used" not in notes("gpt2", seq_len=77)


def test_labels_and_projections_without_a_use_are_said() -> None:
    assert "num_labels is not used: GPT2LMHeadModel has no classes (--task-type)" in notes("gpt2", num_labels=3)
    assert "num_labels" not in notes("gpt2", num_labels=3, task_type="SEQ_CLS")
    assert "optim_target_modules is not used: adamw_torch_fused" in notes("gpt2", optim_target_modules="attn")
    assert "not used" not in notes("gpt2", method="full", optim="galore_adamw", optim_target_modules="attn", optim_args="rank=4")


def test_a_trace_without_pictures_says_so() -> None:
    pytest.importorskip("peft")
    from tests.trace.family_configs import FAMILIES

    by_name = {name: notes(FAMILIES[name].config, engine="trace", method="full", seq_len=24) for name in ("qwen2_vl", "llava")}
    assert ["the batch is text only" in by_name[name] for name in ("qwen2_vl", "llava")] == [True, False]


@pytest.mark.parametrize(("model", "notes"), [("t5-small", 1), ("whisper-small", 0), ("gpt2", 0)])
def test_targets_of_encoder_decoders_are_as_long_as_the_input(model: str, notes: int) -> None:
    """Whisper's input is a spectrogram: `seq_len` is the length of its targets."""
    written = estimate(model, method="lora").assumptions.get("notes", [])
    assert sum(note.startswith("targets are counted") for note in written) == notes
