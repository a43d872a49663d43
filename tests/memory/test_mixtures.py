"""Mixtures of experts, latent attention, sinks, Falcon: peaks against the trace of the real classes, and a sum by hand."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from tests.memory.engines import phases

SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1000}
GROUPED = {**SIZES, "num_key_value_heads": 2}
MIXTRAL = {**GROUPED, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN2 = {**GROUPED, "model_type": "qwen2_moe", "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
QWEN2 |= {"shared_expert_intermediate_size": 320}
QWEN3 = {**GROUPED, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
QWEN3 |= {"head_dim": 64, "norm_topk_prob": True}
GRANITE = {**GROUPED, "model_type": "granitemoe", "num_local_experts": 8, "num_experts_per_tok": 3}
LATENT = {"kv_lora_rank": 64, "q_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
DEEPSEEK = {
    **SIZES,
    **LATENT,
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 128,
}
V2 = {**DEEPSEEK, "model_type": "deepseek_v2", "q_lora_rank": None, "first_k_dense_replace": 1, "n_shared_experts": 2}
V2_GROUPS = {**V2, "q_lora_rank": 96, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
V3 = {**DEEPSEEK, "model_type": "deepseek_v3", "first_k_dense_replace": 2, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
GLM = {**GROUPED, "model_type": "glm4_moe", "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 128}
GLM |= {"head_dim": 64, "first_k_dense_replace": 2, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
GLM_NORMED = {**GLM, "use_qk_norm": True, "attention_bias": True}
V3_HALVES = {**V3, "rope_interleave": False}
GPT_OSS = {
    **GROUPED,
    "model_type": "gpt_oss",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 32,
    "sliding_window": 128,
}
FALCON = {"model_type": "falcon", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1000}
FALCON |= {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "alibi": False}
FALCON_NEW = {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}
FALCON_ALIBI = {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}

PLAIN: dict[str, Any] = {"trainer": "plain"}
FP32 = {"trainer": "plain", "dtype": "fp32", "gradient_checkpointing": True}
TRAINER = {"trainer": "transformers"}
OFF = {"trainer": "transformers", "gradient_checkpointing": False}
EAGER = {"trainer": "plain", "attn_implementation": "eager"}
EAGER_TRAINER = {"trainer": "transformers", "attn_implementation": "eager"}
PADDED = {"trainer": "plain", "padding": True}
FLASH = {"trainer": "plain", "attn_implementation": "flash_attention_2"}
EXPERTS = {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
TOLERANCE = 0.003
"""The batch itself, integers for positions and the sorting of rows, and scalars."""


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("config", "method", "options"),
    [
        (MIXTRAL, "full", TRAINER),
        (MIXTRAL, "lora", {**TRAINER, **EXPERTS}),
        (MIXTRAL, "qlora", PLAIN),
        (QWEN2, "full", FP32),
        (QWEN2, "lora", {**TRAINER, **EXPERTS}),
        (QWEN3, "full", PADDED),
        (GRANITE, "lora", OFF),
        (V2, "lora", EAGER_TRAINER),
        (V2_GROUPS, "qlora", TRAINER),
        (V3, "full", TRAINER),
        (V3, "lora", {**PADDED, **EXPERTS}),
        (V3_HALVES, "lora", EAGER),
        (GLM, "full", TRAINER),
        (GLM, "lora", {**PADDED, **EXPERTS}),
        (GLM_NORMED, "qlora", TRAINER),
        (GLM_NORMED, "lora", EAGER),
        (GPT_OSS, "full", EAGER),
        (GPT_OSS, "lora", {**EAGER_TRAINER, **EXPERTS}),
        (GPT_OSS, "full", FLASH),
        (GPT_OSS, "lora", {**FLASH, **EXPERTS, "gradient_checkpointing": True}),
        (FALCON, "lora", EAGER_TRAINER),
        (FALCON_NEW, "full", EAGER_TRAINER),
        (FALCON_ALIBI, "qlora", EAGER_TRAINER),
    ],
)
def test_peaks_are_those_of_the_trace(config: dict[str, Any], method: str, options: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    ours = phases(config, "analytic", method=method, batch_size=2, **options)
    traced = phases(config, "trace", method=method, batch_size=2, **options)
    for phase in ("load", "forward", "backward", "step"):
        assert ours[phase] == pytest.approx(traced[phase], rel=TOLERANCE), phase


def test_the_experts_of_a_layer_keep_a_row_for_each_choice() -> None:
    """Layers 4 and 5 of Mixtral differ by what one layer keeps: bytes of bf16, h = 256, i = 384, 8 heads of 32, 2 for keys.

    Each of the n tokens stands in k = 2 rows, of which the experts keep gate and up, the activation, their product, and the
    result that the router's weight multiplies; the chosen rows themselves, since the experts train.
    """
    sizes = {"method": "full", "batch_size": 2, "seq_len": 256, "trainer": "plain", "use_cache": False}
    four, five = (estimate({**MIXTRAL, "num_hidden_layers": layers}, **sizes).peaks for layers in (4, 5))
    assert four is not None
    assert five is not None

    def activations(peaks: Any) -> int:
        return sum(line.bytes() for line in peaks.ledgers["forward"] if line.category == "activations")

    n, k, e, h, i, g = 512, 2, 8, 256, 384, 64
    norms = 2 * (4 * h + 2 * h + 2 * h + 4)  # twice: the fp32 input, before and after the weight, one fp32 rsqrt
    attention = 2 * (h + 2 * g + h) + 4 * 8  # q, k, v and the output; one fp32 logsumexp per head
    router = 4 * e + 4 * k + 8 * k + 4  # fp32 softmax, the best of it, their indices, their sum
    rows = k * (2 * h + 2 * 2 * i + 2 * i + 2 * i + 2 * h)
    order = k * (3 * 8 + 4)  # which token a row is of, where it goes and where it comes from; its fp32 weight
    blocks = 3 * 512  # flash attention's random state, two tensors; where each expert's rows end
    assert activations(five) - activations(four) == n * (norms + attention + router + rows + order) + blocks


def test_gpt_oss_without_groups_copies_values_once_they_are_cast() -> None:
    """DoRA's values are fp32 and lie token by token: autocast casts them, then `matmul` copies them, behind the softmax."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 960, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64, "intermediate_size": 1760}
    config = {**GPT_OSS, **sizes, "num_local_experts": 4, "num_hidden_layers": 1}
    options = {"method": "qdora", "trainer": "trl", "gradient_checkpointing": False, "batch_size": 3, "seq_len": 384}
    ours, traced = (estimate(config, engine=engine, **options).peaks for engine in ("analytic", "trace"))  # type: ignore[arg-type]
    assert ours is not None
    assert traced is not None
    assert ours.reserved == traced.reserved  # 360,710,144 before, 415,236,096 traced


def test_backward_makes_the_gradient_of_a_shared_expert_before_that_of_its_gate() -> None:
    """`sigmoid(gate) * shared`: torch makes the second factor's gradient first. With one expert a token, its rows get a view.

    What is freed first decides which free blocks the next layers take, and so what is reserved.
    """
    pytest.importorskip("transformers")
    config = {**QWEN2, "hidden_size": 1152, "num_attention_heads": 9, "num_key_value_heads": 9, "num_experts_per_tok": 1}
    options = {"method": "full", "dtype": "fp32", "autocast": "none", "gradient_checkpointing": True}
    ours, traced = (
        estimate(config, engine=engine, trainer="plain", seq_len=256, batch_size=6, **options).peaks
        for engine in ("analytic", "trace")
    )
    assert ours is not None
    assert traced is not None
    assert ours.reserved == traced.reserved
    assert ours.by_phase["step"] == pytest.approx(traced.by_phase["step"], abs=4096)
