"""Qwen 3.5 (text): layers with a delta rule in place of attention, dense and with experts."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.arch.readers import read_config
from peftplan.errors import InputError

TINY: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
OF_TYPE: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"intermediate_size": 96},
    "qwen3_5_moe_text": {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
OF_TYPE["qwen3_next"] = OF_TYPE["qwen3_5_moe_text"]


@pytest.mark.parametrize("model_type", OF_TYPE)
@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 8},
        {"layer_types": None, "num_hidden_layers": 5, "linear_conv_kernel_dim": 3, "tie_word_embeddings": True},
        {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
    ],
)
def test_is_the_real_model(model_type: str, changes: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    from tests.arch.meta import assert_task

    assert_task({"model_type": model_type, **TINY, **OF_TYPE[model_type], **changes}, "CAUSAL_LM")


def test_types_of_layers_are_checked() -> None:
    config = {"model_type": "qwen3_5_text", **TINY, **OF_TYPE["qwen3_5_text"], "layer_types": ["linear_attention"] * 2}
    with pytest.raises(InputError, match="3 entries"):
        read_config(config, name="test")
