"""Falcon-H1: Mamba 2 and attention in each layer, with a norm behind the scan or without."""

from __future__ import annotations

from typing import Any

import pytest

TINY: dict[str, Any] = {
    "model_type": "falcon_h1", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "mamba_d_ssm": 24, "mamba_n_heads": 6, "mamba_d_head": 4, "mamba_d_state": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mamba_rms_norm": True, "mamba_n_groups": 2, "head_dim": 8, "tie_word_embeddings": True},
        {"mamba_d_ssm": None, "mamba_n_heads": 8, "mamba_d_head": 6, "mamba_conv_bias": False, "mamba_proj_bias": True},
        {"projectors_bias": True, "attention_bias": True, "mlp_bias": True, "mamba_d_conv": 3},
    ],
)
def test_is_the_real_model(changes: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    from tests.arch.meta import assert_task

    for task_type in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
        assert_task(TINY | changes, task_type)
