"""BART and Whisper against transformers' own models and hand sums."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch

from peftplan.arch.bart import BART_TASKS, WHISPER_TASKS
from peftplan.arch.readers import read_config
from peftplan.errors import InputError
from tests.arch.meta import assert_prompt, assert_task, build

SHARED = {
    "vocab_size": 20,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 12,
    "pad_token_id": 1,
}
BART = {"model_type": "bart", **SHARED, "max_position_embeddings": 10}
WHISPER = {"model_type": "whisper", **SHARED, "num_mel_bins": 5, "max_source_positions": 7, "max_target_positions": 9}
VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "num_labels": 5, "activation_function": "relu"},
    "deeper decoder": {"decoder_layers": 3, "encoder_layers": 1, "scale_embedding": True},
}
CASES = [(BART, task) for task in BART_TASKS] + [(WHISPER, task) for task in WHISPER_TASKS]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("base", "task_type"), CASES)
def test_same_as_transformers(base, task_type, variant):
    config = {**base, **VARIANTS[variant]}
    assert_prompt(assert_task(config, task_type), config)


def test_hand_sum_of_bart():
    # shared 20·8, positions 2 × (10 + 2)·8, embedding norms 2 × 16 = 384
    # attention 4·(8·8 + 8) + norm 16 = 304; encoder layer 304 + 8·16 + 16 + 16·8 + 8 + norm 16 = 600, twice
    # decoder layer 2·304 + 8·12 + 12 + 12·8 + 8 + norm 16 = 836
    assert read_config(BART, name="made up").num_parameters == 384 + 2 * 600 + 836


def test_hand_sum_of_whisper():
    # encoder: conv1 8·5·3 + 8, conv2 8·8·3 + 8, positions 7·8 = 384; final norm 16
    # attention 4·8·8 + 3·8 (keys have no bias) + norm 16 = 296; layer 296 + 280 + 16 = 592, twice
    # decoder: words 20·8 + positions 9·8 = 232; layer 2·296 + 212 + 16 = 820; final norm 16
    assert read_config(WHISPER, name="made up").num_parameters == 384 + 2 * 592 + 16 + 232 + 820 + 16


def test_whisper_creates_its_sinusoid_frozen():
    assert read_config(WHISPER, name="made up").frozen == ("model.encoder.embed_positions.weight",)


def test_buffer_follows_the_dtype_of_the_model():
    (buffer,) = read_config(BART, name="made up").buffers
    model = build(BART, "BartForConditionalGeneration").to(torch.bfloat16)
    assert (buffer.name, buffer.dtype, buffer.shape) == ("final_logits_bias", "model", (1, 20))
    assert model.final_logits_bias.dtype is torch.bfloat16


def test_blocks():
    encoder, decoder = read_config(BART, name="made up").blocks
    assert (encoder.norm_position, encoder.layers, decoder.layers) == ("post", (0, 1), (0,))
    assert [(a.num_attention_heads, a.head_dim, a.causal, a.cross) for a in decoder.attentions] == [
        (4, 2, True, False),
        (4, 2, False, True),
    ]
    assert [block.norm_position for block in read_config(WHISPER, name="made up").blocks] == ["pre", "pre"]
    (alone,) = read_config(BART, name="made up", task_type="CAUSAL_LM").blocks
    assert [a.cross for a in alone.attentions] == [False]


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="decoder_attention_heads"):
        read_config({**BART, "decoder_attention_heads": 3}, name="made up")
