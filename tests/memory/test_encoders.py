"""Encoders, encoder-decoders and vision: peaks against the trace of the real classes, and a sum by hand."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from tests.memory.engines import phases

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1000}
SIDES = {"d_model": 256, "encoder_ffn_dim": 768, "decoder_ffn_dim": 640, "encoder_layers": 4, "decoder_layers": 3}
HEADS = {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "vocab_size": 1000}
TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "is_encoder_decoder": True}
BERT = {"model_type": "bert", "max_position_embeddings": 514, "type_vocab_size": 2, "pad_token_id": 0, **SIZES}
ROBERTA = {**BERT, "model_type": "roberta", "pad_token_id": 1}
XLM = {**ROBERTA, "model_type": "xlm-roberta", "type_vocab_size": 1}
DISTILBERT = {
    "model_type": "distilbert",
    "dim": 256,
    "hidden_dim": 768,
    "n_layers": 4,
    "n_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 514,
}
MODERNBERT = {
    **SIZES,
    "model_type": "modernbert",
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "max_position_embeddings": 514,
    "pad_token_id": 0,
    "local_attention": 128,
}
VIT = {**SIZES, "model_type": "vit", "image_size": 32, "patch_size": 2, "num_channels": 3, "hidden_dropout_prob": 0.1}
BART = {"model_type": "bart", "max_position_embeddings": 512, "activation_function": "gelu", "dropout": 0.1}
BART |= {**SIDES, **HEADS, **TOKENS}
WHISPER = {"model_type": "whisper", "num_mel_bins": 16, "max_source_positions": 200, "max_target_positions": 448}
WHISPER |= {**SIDES, **HEADS, **TOKENS}
T5 = {
    **TOKENS,
    "model_type": "t5",
    "d_model": 256,
    "d_ff": 768,
    "d_kv": 32,
    "num_heads": 8,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "vocab_size": 1000,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.1,
}
PLAIN: dict[str, Any] = {"trainer": "plain"}
FP32 = {"trainer": "plain", "dtype": "fp32", "gradient_checkpointing": True}
TRAINER = {"trainer": "transformers"}
OFF = {"trainer": "transformers", "gradient_checkpointing": False}
EAGER = {"trainer": "plain", "attn_implementation": "eager"}
PADDED = {"trainer": "plain", "padding": True}
TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "vit": ["q_proj", "fc1"],
    "bart": ["q_proj", "v_proj", "fc1"],
    "whisper": ["q_proj", "v_proj", "fc1"],
    "t5": ["q", "v", "wi_0"],
}
TOLERANCE = 0.005
"""The batch itself, integers for masks and positions, and the fp32 statistics of LayerNorm, which a CPU keeps in bf16."""


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("config", "head", "method", "options"),
    [
        (BERT, "BertForMaskedLM", "full", PLAIN),
        (BERT, "BertForMaskedLM", "full", TRAINER),
        (BERT, "BertForMaskedLM", "full", EAGER),
        (BERT, "BertForMaskedLM", "lora", TRAINER),
        (BERT, "BertForMaskedLM", "qlora", TRAINER),
        (BERT, "BertForMaskedLM", "lora", {**TRAINER, "quant": "int8"}),
        (BERT, "BertForSequenceClassification", "full", PLAIN),
        (BERT, "BertForTokenClassification", "full", FP32),
        (ROBERTA, "RobertaForMaskedLM", "lora", OFF),
        (ROBERTA, "RobertaForSequenceClassification", "full", PADDED),
        (XLM, "XLMRobertaForQuestionAnswering", "full", TRAINER),
        (DISTILBERT, "DistilBertForMaskedLM", "full", FP32),
        (DISTILBERT, "DistilBertForSequenceClassification", "full", PLAIN),
        (DISTILBERT, "DistilBertForMaskedLM", "lora", TRAINER),
        (MODERNBERT, "ModernBertForMaskedLM", "full", PLAIN),
        (MODERNBERT, "ModernBertForMaskedLM", "full", EAGER),
        (MODERNBERT, "ModernBertForMaskedLM", "lora", TRAINER),
        (VIT, "ViTForImageClassification", "full", PLAIN),
        (VIT, "ViTForImageClassification", "full", FP32),
        (VIT, "ViTForImageClassification", "lora", TRAINER),
        (BART, "BartForConditionalGeneration", "full", PLAIN),
        (BART, "BartForConditionalGeneration", "full", TRAINER),
        (BART, "BartForConditionalGeneration", "lora", OFF),
        (BART, "BartForConditionalGeneration", "lora", {**OFF, "quant": "int8"}),
        (BART, "BartForSequenceClassification", "full", FP32),
        (WHISPER, "WhisperForConditionalGeneration", "lora", TRAINER),
        (WHISPER, "WhisperForConditionalGeneration", "lora", EAGER),
        (T5, "T5ForConditionalGeneration", "full", PLAIN),
        (T5, "T5ForConditionalGeneration", "full", FP32),
        (T5, "T5ForConditionalGeneration", "full", PADDED),
        (T5, "T5ForConditionalGeneration", "lora", OFF),
    ],
)
def test_peaks_are_those_of_the_trace(config: dict[str, Any], head: str, method: str, options: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    if method != "full":
        options = {**options, "target_modules": TARGETS[config["model_type"]]}
    model = {**config, "architectures": [head]}
    ours = phases(model, "analytic", method=method, **options)
    traced = phases(model, "trace", method=method, **options)
    for phase in ("load", "forward", "backward", "step"):
        assert ours[phase] == pytest.approx(traced[phase], rel=TOLERANCE), phase


def test_a_bert_layer_keeps_what_its_modules_need() -> None:
    """Layers 4 and 5 differ by what one layer keeps, in bytes of bf16 per token, h = 256, i = 768, 8 heads."""
    base = {**BERT, "architectures": ["BertForMaskedLM"]}
    sizes = {"method": "full", "batch_size": 4, "seq_len": 256, "trainer": "plain"}
    four, five = (estimate({**base, "num_hidden_layers": n}, **sizes).peaks for n in (4, 5))
    assert four is not None
    assert five is not None

    def activations(peaks: Any) -> int:
        return sum(line.bytes() for line in peaks.ledgers["forward"] if line.category == "activations")

    h, i = 256, 768
    attention = 2 * (3 * h + h) + 4 * 8  # q, k, v and the output, and one fp32 logsumexp per head
    sublayers = 2 * (2 * 2 * h + h)  # twice: the sum before the norm, the norm's result, and dropout's mask of one byte
    norms = 2 * 2 * 4  # mean and rstd in fp32, twice
    mlp = 2 * 2 * i  # before and after gelu
    per_token = attention + sublayers + norms + mlp
    rng = 2 * 512  # flash attention's random state: two small tensors, a block of the allocator each
    assert activations(five) - activations(four) == 4 * 256 * per_token + rng
