"""DeBERTa v2 and v3 against transformers' own models and hand sums."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peftplan.arch.deberta import TASKS
from peftplan.arch.readers import read_config
from tests.arch.meta import assert_prompt, assert_task

V3 = {
    "model_type": "deberta-v2",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 6,
    "relative_attention": True,
    "position_buckets": 3,
    "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
}
VARIANTS = {
    "v3": {},
    "v2 xlarge": {"conv_kernel_size": 3, "conv_groups": 2, "conv_act": "gelu", "attention_head_size": 6},
    "own position keys": {"share_att_key": False, "position_buckets": -1, "max_relative_positions": 5, "type_vocab_size": 2},
    "one kind of positions": {"share_att_key": False, "pos_att_type": "c2p", "norm_rel_ebd": "none", "position_buckets": -1},
    "absolute": {"relative_attention": False, "position_biased_input": True, "tie_word_embeddings": False},
    "narrow embedding": {"embedding_size": 4, "position_biased_input": True, "num_labels": 3},
    "new head": {"legacy": False, "pooler_hidden_size": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task_type", TASKS)
def test_same_as_transformers(variant, task_type):
    config = {**V3, **VARIANTS[variant]}
    assert_prompt(assert_task(config, task_type), config)


def test_hand_sum():
    # words 11·8 + norm 16 = 104; layer as BERT's 600, twice; relative positions 2·3·8 + norm 16 = 64
    # head: dense 8·8 + 8 + norm 16 + bias 11 = 99
    assert read_config(V3, name="made up").num_parameters == 104 + 2 * 600 + 64 + 99
    # pooler 8·8 + 8, classifier 8·2 + 2
    assert read_config(V3, name="made up", task_type="SEQ_CLS").num_parameters == 104 + 2 * 600 + 64 + 72 + 18


def test_blocks():
    (block,) = read_config(V3, name="made up").blocks
    assert [a.positions for a in block.attentions] == ["disentangled"]
    (block,) = read_config({**V3, **VARIANTS["v2 xlarge"]}, name="made up").blocks
    assert [a.head_dim for a in block.attentions] == [6]
