"""Nemotron-H: layers of one part each, by the letters of a pattern or by their names."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.arch.readers import read_config
from peftplan.errors import InputError

TINY: dict[str, Any] = {
    "model_type": "nemotron_h", "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": 64, "mamba_num_heads": 6, "mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 16,
    "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 20, "n_routed_experts": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"hybrid_override_pattern": "M-*M"},
        {"hybrid_override_pattern": "*EM-", "use_bias": True, "mlp_bias": True, "use_conv_bias": False, "conv_kernel": 3},
        {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "moe_latent_size": 16, "tie_word_embeddings": False},
        {"layers_block_type": ["linear_attention", "full_attention"]},
    ],
)
def test_is_the_real_model(changes: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    from tests.arch.meta import assert_task

    for task_type in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
        assert_task(TINY | changes, task_type)


def test_what_a_mixer_projects_to() -> None:
    """6 heads of 4 for the gate and for the scan, inputs and outputs of states of 16 numbers in 2 groups, and 6 time steps."""
    arch = read_config(TINY | {"hybrid_override_pattern": "M*"}, name="test")
    (in_proj,) = (module for module in arch.modules if module.leaf == "in_proj")
    assert in_proj.out_features == 2 * 6 * 4 + 2 * 2 * 16 + 6
    assert [block.layers for block in arch.blocks] == [(1,), (0,)]


def test_other_layers_are_refused() -> None:
    for pattern in ("M-X", ""):
        with pytest.raises(InputError, match="hybrid_override_pattern"):
            read_config(TINY | {"hybrid_override_pattern": pattern}, name="test")
