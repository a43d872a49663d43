"""DistilBERT against transformers' own models and hand sums."""

import pytest

pytest.importorskip("transformers")

from peftplan.arch.distilbert import TASKS
from peftplan.arch.readers import read_config
from peftplan.errors import InputError
from tests.arch.meta import assert_task

TINY = {
    "model_type": "distilbert",
    "vocab_size": 11,
    "dim": 8,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 16,
    "max_position_embeddings": 6,
}
ALIASES = {"dim": None, "n_layers": None, "n_heads": None, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3}
VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "num_labels": 2, "activation": "relu"},
    "other names": ALIASES,
    "sinusoids": {"sinusoidal_pos_embds": True, "hidden_dim": 24},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task_type", TASKS)
def test_same_as_transformers(variant, task_type):
    config = {key: value for key, value in {**TINY, **VARIANTS[variant]}.items() if value is not None}
    assert_task(config, task_type)


def test_hand_sum():
    # words 11·8 + positions 6·8 + norm 16 = 152
    # layer: q, k, v, out 4·(8·8 + 8) + norm 16 + lin1 8·16 + 16 + lin2 16·8 + 8 + norm 16 = 600, twice
    # head: transform 8·8 + 8 + norm 16 + the projector's bias 11 (its weight is the embedding)
    assert read_config(TINY, name="made up").num_parameters == 152 + 2 * 600 + 72 + 16 + 11
    # pre_classifier 8·8 + 8, classifier 8·2 + 2
    assert read_config(TINY, name="made up", task_type="SEQ_CLS").num_parameters == 152 + 2 * 600 + 72 + 18


def test_intermediate_size_is_not_a_field_of_this_config():
    with pytest.raises(InputError, match="hidden_dim"):
        read_config({**TINY, "intermediate_size": 20}, name="made up")
