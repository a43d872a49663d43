"""LFM2: layers with a convolution in place of attention, and an MLP whose width follows from a stated one."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.arch.readers import read_config
from peftplan.errors import InputError

TINY: dict[str, Any] = {
    "model_type": "lfm2", "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "block_multiple_of": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["conv", "full_attention", "conv"]},
        {"full_attn_idxs": [1], "conv_bias": True, "block_ffn_dim_multiplier": 1.3, "tie_word_embeddings": False},
        {"conv_L_cache": 4, "block_auto_adjust_ff_dim": False, "block_ff_dim": 72, "layer_types": ["conv"] * 3, "head_dim": 8},
        {},
    ],
)
def test_is_the_real_model(changes: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    from tests.arch.meta import assert_task

    for task_type in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
        assert_task(TINY | changes, task_type)


def test_the_width_of_the_mlp() -> None:
    """350M: 6,656 stated, two thirds are 4,437, which make 18 times 256 (`Lfm2MLP.__init__`)."""
    arch = read_config(TINY | {"block_ff_dim": 6656, "block_multiple_of": 256}, name="test")
    assert arch.blocks[0].mlp.intermediate_size == 18 * 256


def test_other_types_of_layers_are_refused() -> None:
    with pytest.raises(InputError, match="layer_types"):
        read_config(TINY | {"layer_types": ["conv", "sliding_attention", "conv"]}, name="test")
