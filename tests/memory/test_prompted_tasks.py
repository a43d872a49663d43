"""Virtual tokens before classifiers: peaks against the trace of peft's classes, and what the libraries refuse, in their words."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.errors import RefusedError
from tests.memory.engines import OFF, PLAIN, TOLERANCE, TRAINER, phases, shallow
from tests.memory.test_encoders import BERT, DISTILBERT, MODERNBERT, ROBERTA

LLAMA: dict[str, Any] = {**BERT, "model_type": "llama", "num_key_value_heads": 4}
DEBERTA: dict[str, Any] = {
    **BERT,
    "model_type": "deberta-v2",
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "norm_rel_ebd": "layer_norm",
}
CLASSES = {"task_type": "SEQ_CLS", "num_labels": 3}
ANSWERS = {"task_type": "QUESTION_ANS"}
EAGER = {"attn_implementation": "eager", "padding": True}
FREE = {"gradient_checkpointing": False}
FP32 = {"dtype": "fp32", "autocast": "none"}
SIZES = {"num_layers": 4, "token_dim": 256, "num_attention_heads": 8}
"""What peft does not find in DistilBERT's config."""


@pytest.mark.parametrize(
    ("config", "method", "options"),
    [
        (BERT, "prompt-tuning", {**PLAIN, **CLASSES, **EAGER}),
        (BERT, "p-tuning", {**OFF, **ANSWERS, "padding": True}),
        (ROBERTA, "p-tuning", {**PLAIN, **CLASSES, **FREE, **FP32}),
        (ROBERTA, "prompt-tuning", {**TRAINER, **CLASSES, "dtype": "fp32", "autocast": "bf16", "padding": True}),
        (DISTILBERT, "prompt-tuning", {**OFF, **CLASSES, **SIZES}),
        (MODERNBERT, "prompt-tuning", {**PLAIN, **CLASSES, **FREE, **EAGER}),
        (MODERNBERT, "p-tuning", {**TRAINER, **ANSWERS}),
        (DEBERTA, "prompt-tuning", {**PLAIN, **CLASSES, **EAGER, **FREE}),
        (LLAMA, "prompt-tuning", {**PLAIN, **CLASSES}),
        (LLAMA, "p-tuning", {**OFF, **CLASSES, **EAGER}),
    ],
)
def test_each_phase_peaks_where_the_trace_does(config: dict[str, Any], method: str, options: dict[str, Any]) -> None:
    """Load, forward, backward and step."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    job = {"num_virtual_tokens": 20, **options}
    analytic, traced = (phases(config, engine, method=method, **job) for engine in ("analytic", "trace"))
    assert analytic == {phase: pytest.approx(nbytes, rel=TOLERANCE) for phase, nbytes in traced.items()}


@pytest.mark.parametrize(
    ("model", "method", "task", "reason"),
    [
        # 2 · (32 + 20) scores and 2 · 32 labels
        ("bert-base-cased", "prompt-tuning", "TOKEN_CLS", r"Expected input batch_size \(104\) to match target batch_size \(64\)"),
        # 2 · 52 scores of two classes each
        ("falcon-7b", "p-tuning", "TOKEN_CLS", r"shape '\[64, 2\]' is invalid for input of size 208"),
        (
            "bart-base",
            "prompt-tuning",
            "SEQ_CLS",
            "input embeddings is currently not supported for BartForSequenceClassification",
        ),
        ("t5-small", "p-tuning", "QUESTION_ANS", "If no `decoder_input_ids` or `decoder_inputs_embeds` are passed"),
    ],
)
def test_both_engines_refuse_what_the_libraries_do(model: str, method: str, task: str, reason: str) -> None:
    """Labels for fewer tokens, classes that read no embeddings."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    options: dict[str, Any] = {"task_type": task, "batch_size": 2, "seq_len": 32, "num_virtual_tokens": 20, **OFF}
    for engine in ("analytic", "trace"):
        with pytest.raises(RefusedError, match=reason):
            estimate(shallow(model, 2), method=method, engine=engine, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "task"), [("bert-base-cased", "SEQ_CLS"), ("gpt2", "TOKEN_CLS"), ("modernbert-base", "QUESTION_ANS")]
)
def test_a_prefix_that_earlier_versions_ran_is_counted_without_a_peak(model: str, task: str) -> None:
    """peft 0.21.2 looks for an argument that transformers 5.24 renamed: what was published before still has its counts."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    options: dict[str, Any] = {"method": "prefix-tuning", "task_type": task, "num_virtual_tokens": 20, **OFF}
    reason = "ValueError: Model does not support past key values which are required for prefix tuning."
    result = estimate(shallow(model, 2), **options)
    assert result.peaks is None
    assert reason in result.not_modelled[0]
    with pytest.raises(RefusedError, match=reason):
        estimate(shallow(model, 2), engine="trace", **options)


def test_a_saved_head_of_several_layers_trains() -> None:
    """RoBERTa's classifier is two layers, which `modules_to_save` copies: both have gradients when backward ends."""
    peaks = estimate(ROBERTA, method="lora", target_modules=["query"], batch_size=1, seq_len=8, **PLAIN, **CLASSES).peaks
    assert peaks is not None
    named = {line.name for line in peaks.ledgers["step"] if line.category == "gradients"}
    assert {f"classifier.modules_to_save.{part}.weight.grad" for part in ("dense", "out_proj")} <= named
