"""BERT, RoBERTa and XLM-RoBERTa against transformers' own models and hand sums."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peftplan.arch.bert import TASKS
from peftplan.arch.readers import read_config
from peftplan.errors import InputError, UnknownNameError
from tests.arch.meta import assert_prompt, assert_task

TINY = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 6,
    "type_vocab_size": 2,
}
VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "type_vocab_size": 1, "num_labels": 5},
    "decoder": {"is_decoder": True, "hidden_act": "relu", "id2label": {"0": "a", "1": "b", "2": "c"}},
    "cross attention": {"is_decoder": True, "add_cross_attention": True, "num_hidden_layers": 1},
}
TYPES = ("bert", "roberta", "xlm-roberta")


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task_type", TASKS)
def test_same_as_transformers(model_type, variant, task_type):
    config = {"model_type": model_type, **TINY, **VARIANTS[variant]}
    assert_prompt(assert_task(config, task_type), config)


@pytest.mark.parametrize("model_type", TYPES)
def test_hand_sum(model_type):
    # words 11·8 + positions 6·8 + types 2·8 + norm 2·8 = 168
    # layer: q, k, v, o 4·(8·8 + 8) + norm 16 + up 8·16 + 16 + down 16·8 + 8 + norm 16 = 600, twice
    # head: dense 8·8 + 8 + norm 16 + bias 11 = 99; its decoder is the embedding, and the decoder's bias the head's
    config = {"model_type": model_type, **TINY}
    assert read_config(config, name="made up").num_parameters == 168 + 2 * 600 + 99
    untied = {**config, "tie_word_embeddings": False}
    assert read_config(untied, name="made up").num_parameters == 168 + 2 * 600 + 99 + 11 * 8 + 11


def test_blocks():
    (block,) = read_config({"model_type": "bert", **TINY}, name="made up").blocks
    assert (block.stack, block.layers, block.norm, block.norm_position) == ("encoder", (0, 1), "layernorm", "post")
    (attention,) = block.attentions
    assert (attention.num_attention_heads, attention.head_dim, attention.causal) == (2, 4, False)
    crossing = {"model_type": "bert", **TINY, "is_decoder": True, "add_cross_attention": True}
    (block,) = read_config(crossing, name="made up").blocks
    assert (block.stack, [(a.causal, a.cross) for a in block.attentions]) == ("decoder", [(True, False), (False, True)])


def test_what_is_refused():
    config = {"model_type": "bert", **TINY}
    with pytest.raises(InputError, match="is_decoder"):
        read_config({**config, "add_cross_attention": True}, name="made up")
    with pytest.raises(InputError, match="multiple of num_attention_heads"):
        read_config({**config, "num_attention_heads": 3}, name="made up")
    with pytest.raises(InputError, match="max_position_embeddings"):
        read_config({**config, "max_position_embeddings": None}, name="made up")
    with pytest.raises(UnknownNameError, match="SEQ_2_SEQ_LM"):
        read_config(config, name="made up", task_type="SEQ_2_SEQ_LM")


def test_task_that_the_config_states():
    config = {"model_type": "bert", **TINY, "architectures": ["BertForSequenceClassification"], "num_labels": 4}
    # pooler 8·8 + 8, classifier 8·4 + 4, no language model
    assert read_config(config, name="made up").num_parameters == 168 + 2 * 600 + 72 + 36
    assert read_config({**config, "architectures": ["BertForPreTraining"]}, name="made up").task_type == "MASKED_LM"
    assert read_config({**config, "architectures": ["BertLMHeadModel"]}, name="made up").model_class == "BertLMHeadModel"
