"""ViT against transformers' own models and hand sums."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peftplan.arch.readers import read_config
from peftplan.arch.vit import TASKS
from peftplan.errors import InputError
from tests.arch.meta import assert_prompt, assert_task

TINY = {
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 3,
}
VARIANTS = {
    "plain": {},
    "no qkv bias": {"qkv_bias": False, "num_labels": 10, "num_channels": 1},
    "oblong": {"image_size": [12, 16], "patch_size": [4, 2], "pooler_output_size": 5},
    "wide heads": {"head_dim": 6, "hidden_act": "relu", "id2label": {"0": "a", "1": "b", "2": "c"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task_type", TASKS)
def test_same_as_transformers(variant, task_type):
    config = {**TINY, **VARIANTS[variant]}
    assert_prompt(assert_task(config, task_type), config)


def test_hand_sum():
    # class token 8, positions (3·3 + 1)·8, patches 8·3·4·4 + 8 = 480
    # layer: q, k, v, o 4·(8·8 + 8) + norms 2·16 + fc1 8·16 + 16 + fc2 16·8 + 8 = 600, twice; final norm 16
    # classifier 8·3 + 3
    assert read_config({**TINY, "num_labels": 3}, name="made up").num_parameters == 480 + 2 * 600 + 16 + 27


def test_sides_are_one_number_or_two():
    with pytest.raises(InputError, match="image_size"):
        read_config({**TINY, "image_size": [12, 12, 12]}, name="made up")
