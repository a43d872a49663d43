"""ModernBERT against transformers' own models and hand sums."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from transformers import ModernBertConfig
from transformers.masking_utils import sliding_window_bidirectional_overlay

from peftplan.arch.modernbert import TASKS
from peftplan.arch.readers import read_config
from peftplan.errors import InputError
from tests.arch.meta import assert_prompt, assert_task

TINY = {
    "model_type": "modernbert",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "pad_token_id": 0,
}
BIASES = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
VARIANTS = {
    "plain": {},
    "biases": {**BIASES, "tie_word_embeddings": False, "num_labels": 3},
    "no decoder bias": {"decoder_bias": False, "num_hidden_layers": 1},
    "one kind of layer": {"layer_types": ["sliding_attention"] * 4, "local_attention": 7},
    "every second layer": {"global_attn_every_n_layers": 2, "num_attention_heads": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task_type", TASKS)
def test_same_as_transformers(variant, task_type):
    config = {**TINY, **VARIANTS[variant]}
    assert_prompt(assert_task(config, task_type), config)


def test_hand_sum():
    # words 11·8 + norm 8 = 96
    # layer: Wqkv 8·24 + Wo 8·8 + norm 8 + Wi 8·24 + Wo 12·8 = 552, four times; attn_norm 8, not in layer 0; final norm 8
    # head: dense 8·8 + norm 8 + decoder bias 11
    assert read_config(TINY, name="made up").num_parameters == 96 + 4 * 552 + 3 * 8 + 8 + 64 + 8 + 11


def test_windows():
    full, sliding = read_config({**TINY, "local_attention": 7}, name="made up").blocks
    assert (full.layers, sliding.layers) == ((0, 3), (1, 2))
    assert full.attentions[0].window is None
    sees = sliding_window_bidirectional_overlay(ModernBertConfig(local_attention=7).sliding_window)
    assert sliding.attentions[0].window == sum(sees(0, 0, 50, key) for key in range(100))


@pytest.mark.parametrize("types", [["full_attention"] * 3, ["chunked_attention"] * 4])
def test_layer_types_are_checked(types):
    with pytest.raises(InputError, match="layer_types"):
        read_config({**TINY, "layer_types": types}, name="made up")
