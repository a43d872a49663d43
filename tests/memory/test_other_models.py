"""Encoders, encoder-decoders and classifiers where the two engines once differed: peaks by phase against the trace."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan import estimate
from tests.memory.engines import LLAMA, OFF, PLAIN, TOLERANCE, TRAINER, phases
from tests.memory.test_encoders import BART, BERT, T5, WHISPER

BART_LM = {**BART, "architectures": ["BartForConditionalGeneration"]}
WHISPER_LM = {**WHISPER, "architectures": ["WhisperForConditionalGeneration"]}
T5_LM = {**T5, "architectures": ["T5ForConditionalGeneration"]}
BERT_TOKENS = {**BERT, "architectures": ["BertForTokenClassification"]}
EAGER = {"attn_implementation": "eager"}
FP16 = {"dtype": "fp32", "autocast": "fp16"}


@pytest.mark.parametrize(
    ("config", "method", "options"),
    [
        (BART_LM, "lora", {**PLAIN, "target_modules": ["q_proj"], "modules_to_save": ["shared"]}),  # neither side reads `shared`
        (BART_LM, "lora", {**OFF, "target_modules": ["q_proj"], "modules_to_save": ["shared"], "keep_gradients": True}),
        (WHISPER_LM, "lora", {**TRAINER, **EAGER, **FP16, "target_modules": ["q_proj"]}),  # softmax from fp16 to fp32 at once
        (WHISPER_LM, "lora", {**TRAINER, **EAGER, "target_modules": ["q_proj"]}),  # values that need no copy for `matmul`
        (WHISPER_LM, "full", {**PLAIN, "batch_size": 1}),  # frozen positions that loading lets train
        (WHISPER_LM, "lora", {**OFF, "dtype": "fp16", "autocast": "fp16", "target_modules": ["q_proj"]}),  # a clamp
        (BERT_TOKENS, "lora", {**PLAIN, "target_modules": "mlp"}),  # `output.dense`, which attention has too
        (BERT_TOKENS, "lora", {**OFF, "target_modules": ["query"]}),  # LayerNorm keeps its bias's copy
        (BERT_TOKENS, "oft", {**TRAINER, "dtype": "fp16", "use_reentrant": True, "target_modules": ["query"]}),  # no leaf
        (T5_LM, "lora", {**PLAIN, "keep_gradients": True, "gradient_accumulation_steps": 2}),  # outputs of the batch before
    ],
)
def test_each_phase_peaks_where_the_trace_does(config: dict[str, Any], method: str, options: dict[str, Any]) -> None:
    ours, traced = (phases(config, engine, method=method, **options) for engine in ("analytic", "trace"))
    for phase in ("load", "forward", "backward", "step"):
        assert ours[phase] == pytest.approx(traced[phase], rel=TOLERANCE), phase


def test_a_step_that_allocates_nothing_peaks_at_what_it_meets() -> None:
    """A fused optimizer with kept gradients works in place."""
    options = {**PLAIN, "optim": "adamw_torch_fused", "keep_gradients": True, "keep_outputs": False}
    peaks = estimate(LLAMA, engine="trace", batch_size=2, seq_len=64, **options).peaks
    assert peaks is not None
    categories = {line.category for line in peaks.ledgers["step"] if line.name != "tails of unsplit blocks"}
    assert categories >= {"weights", "adapter_weights", "gradients", "optimizer_states"}


OLMO = {"model_type": "olmo", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MPT = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2}


@pytest.mark.parametrize(
    ("config", "clipped"),
    [({**OLMO, "vocab_size": 96}, {"clip_qkv": 8.0}), ({**MPT, "vocab_size": 96}, {"attn_config": {"clip_qkv": 6.0}})],
)
def test_clamped_q_k_and_v_take_memory_that_no_formula_counts(config: dict[str, Any], clipped: dict[str, Any]) -> None:
    """`OlmoAttention.forward` clamps in place, of which autograd keeps a copy; `MptAttention.forward` into another tensor."""
    job: dict[str, Any] = {**PLAIN, "method": "full", "seq_len": 512, "gradient_checkpointing": False}
    assert "clip_qkv" in estimate({**config, **clipped}, **job).not_modelled[0]
    plain, clamped = (estimate(each, **job, engine="trace").peaks for each in (config, {**config, **clipped}))
    assert plain is not None
    assert clamped is not None
    assert clamped.by_phase["forward"] > plain.by_phase["forward"]
    assert estimate(config, **job).peaks is not None
