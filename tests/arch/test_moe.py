"""Mixtures of experts (moe.py) and latent attention (mla.py): variants that the built-in models do not show."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.arch.modules import Architecture
from peftplan.arch.readers import read_config
from peftplan.errors import InputError, UnknownNameError

Config = dict[str, Any]

TINY: Config = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
QWEN: Config = {**TINY, "moe_intermediate_size": 12, "num_experts": 6}
LATENT: Config = {
    **TINY,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 12,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 9,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_group": 1,
    "topk_group": 1,
}
BASE: dict[str, Config] = {
    "mixtral": {**TINY, "num_local_experts": 5},
    "granitemoe": {**TINY, "num_local_experts": 5},
    "gpt_oss": {**TINY, "num_local_experts": 5, "head_dim": 8},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 16},
    "qwen3_moe": QWEN,
    "glm4_moe": {**TINY, "moe_intermediate_size": 12, "n_routed_experts": 6},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
}

VARIANTS: dict[str, list[Config]] = {
    "mixtral": [{}, {"head_dim": 8, "tie_word_embeddings": True}, {"sliding_window": 8, "num_local_experts": 3}],
    "granitemoe": [{}, {"attention_bias": True, "tie_word_embeddings": True}, {"num_key_value_heads": None, "head_dim": 8}],
    "gpt_oss": [
        {},
        {"attention_bias": False, "tie_word_embeddings": True},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 8},
    ],
    "qwen2_moe": [
        {},
        {"decoder_sparse_step": 2, "qkv_bias": False},
        {"mlp_only_layers": [1], "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8},
        {"num_experts": 0, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 8},
    ],
    "qwen3_moe": [
        {},
        {"decoder_sparse_step": 2, "attention_bias": True, "head_dim": 8},
        {"mlp_only_layers": [0, 2], "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8},
        {"num_experts": 0},
    ],
    "glm4_moe": [
        {},
        {"attention_bias": True, "use_qk_norm": True, "n_shared_experts": 2, "head_dim": 8},
        {"first_k_dense_replace": 0, "tie_word_embeddings": True, "partial_rotary_factor": 1.0},
        {"first_k_dense_replace": 3},
    ],
    "deepseek_v2": [
        {},
        {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True},
        {"first_k_dense_replace": 0, "tie_word_embeddings": True, "head_dim": 99},
        {"first_k_dense_replace": 3, "attention_bias": True},
    ],
    "deepseek_v3": [
        {},
        {"q_lora_rank": None, "attention_bias": True},
        {"first_k_dense_replace": 0, "tie_word_embeddings": True, "head_dim": 4},
        {"first_k_dense_replace": 3, "n_shared_experts": 1},
    ],
}

TASKS = dict.fromkeys(VARIANTS, ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"))
TASKS["deepseek_v2"] = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
TASKS["granitemoe"] = TASKS["glm4_moe"] = ("CAUSAL_LM", "FEATURE_EXTRACTION")

EVERY_VARIANT = [(m, v) for m, variants in VARIANTS.items() for v in variants]


def config_of(model_type: str, **changes: Any) -> Config:
    return {"model_type": model_type, **BASE[model_type], **changes}


def read(model_type: str, task_type: str = "CAUSAL_LM", **changes: Any) -> Architecture:
    return read_config(config_of(model_type, **changes), name="test", task_type=task_type)


@pytest.mark.parametrize(("model_type", "changes"), EVERY_VARIANT, ids=str)
def test_is_the_real_model(model_type: str, changes: Config) -> None:
    pytest.importorskip("transformers")
    from tests.arch.meta import assert_task

    for task_type in TASKS[model_type]:
        assert_task(config_of(model_type, **changes), task_type)


@pytest.mark.parametrize("model_type", VARIANTS)
def test_has_the_tasks_that_transformers_has(model_type: str) -> None:
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    assert ("SEQ_CLS" in TASKS[model_type]) == (model_type in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    assert ("TOKEN_CLS" in TASKS[model_type]) == (model_type in auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES)
    for task_type in {"SEQ_CLS", "TOKEN_CLS"} - set(TASKS[model_type]):
        with pytest.raises(UnknownNameError, match="task_type"):
            read(model_type, task_type)


@pytest.mark.parametrize(("model_type", "changes"), EVERY_VARIANT, ids=str)
def test_prompt_dims_are_what_peft_reads(model_type: str, changes: Config) -> None:
    pytest.importorskip("peft")
    from transformers import AutoConfig

    from tests.arch.meta import assert_prompt

    config = config_of(model_type, **changes)
    arch = read_config(config, name="test")
    assert_prompt(arch, config)
    assert arch.prompt is not None
    assert arch.prompt.head_dim == AutoConfig.for_model(**config).to_dict().get("head_dim")


@pytest.mark.parametrize(("model_type", "changes"), EVERY_VARIANT, ids=str)
def test_modules_have_the_kinds_of_fused_experts(model_type: str, changes: Config) -> None:
    pytest.importorskip("transformers")
    from tests.arch.meta import build

    arch = read(model_type, **changes)
    real = dict(build(config_of(model_type, **changes), arch.model_class).named_modules())
    kinds = {name: m.kind for m in arch.modules for name in m.names()}
    experts = {n: m for n, m in real.items() if "Experts" in type(m).__name__}
    assert {n for n, kind in kinds.items() if kind.startswith("Experts")} == experts.keys()
    turned = {n for n, m in experts.items() if getattr(m, "is_transposed", False)}
    assert {n for n, kind in kinds.items() if kind == "ExpertsTransposed"} == turned
    assert {n for n, kind in kinds.items() if kind == "Router"} == {n for n, m in real.items() if "Router" in type(m).__name__}
    assert {n for n, kind in kinds.items() if kind == "RMSNorm"} == {n for n, m in real.items() if "RMSNorm" in type(m).__name__}


@pytest.mark.parametrize(("model_type", "changes"), EVERY_VARIANT, ids=str)
def test_blocks_are_the_real_layers(model_type: str, changes: Config) -> None:
    pytest.importorskip("transformers")
    from tests.arch.meta import build

    arch = read(model_type, **changes)
    model = build(config_of(model_type, **changes), arch.model_class)
    by_layer = {layer: block for block in arch.blocks for layer in block.layers}
    assert sorted(by_layer) == [0, 1, 2]
    for layer, block in by_layer.items():
        real = model.model.layers[layer]
        mlp = getattr(real, "mlp", None) or real.block_sparse_moe
        assert (block.mlp.variant == "moe") == hasattr(mlp, "experts")
        if hasattr(mlp, "experts"):
            assert block.mlp.num_experts == mlp.experts.num_experts
            assert block.mlp.num_experts_per_tok == model.config.num_experts_per_tok
            shared = getattr(mlp, "shared_expert", None) or getattr(mlp, "shared_experts", None)
            assert block.mlp.shared_intermediate_size == (shared.gate_proj.out_features if shared else 0)
            assert block.mlp.intermediate_size == _expert_width(mlp.experts)
        else:
            assert block.mlp.intermediate_size == mlp.gate_proj.out_features
        attention, attn = block.attentions[0], real.self_attn
        assert attention.sinks == hasattr(attn, "sinks")
        assert attention.qk_norm == hasattr(attn, "q_norm")
        if attention.variant == "mla":
            assert (attention.head_dim, attention.value_head_dim) == (attn.qk_head_dim, attn.v_head_dim)
        else:
            assert attention.head_dim == attn.head_dim
        if model_type not in ("qwen2_moe", "mixtral"):
            assert attention.window == getattr(attn, "sliding_window", None)


def _expert_width(experts: Any) -> int:
    down = tuple(experts.down_proj.shape)
    return down[1] if type(experts).__name__ == "GptOssExperts" else down[2]


def test_windows_that_the_module_does_not_store() -> None:
    # Mixtral reads its one window in forward. Qwen2MoeConfig: every second layer, from the first, below max_window_layers.
    assert read("mixtral", sliding_window=8).blocks[0].attentions[0].window == 8
    blocks = read("qwen2_moe", use_sliding_window=True, sliding_window=8, num_hidden_layers=6, max_window_layers=4).blocks
    assert [(b.layers, b.attentions[0].window) for b in blocks] == [((0, 2), 8), ((1, 3, 4, 5), None)]


def test_mixtral_by_hand() -> None:
    # h 24, i 20, 4 heads of 6, 2 key/value heads, 5 experts, v 10. A layer: q and o 2·24·24 = 1152, k and v 2·12·24 = 576,
    # router 5·24 = 120, experts 5·3·20·24 = 7200, two norms 48: 9096; three layers 27288.
    # Embedding and head 2·10·24 = 480, final norm 24.
    assert read("mixtral").num_parameters == 27288 + 480 + 24


def test_gpt_oss_by_hand() -> None:
    # Heads of 8. A layer: q 24·32 + 32 = 800, k and v 2·(24·16 + 16) = 800, o 32·24 + 24 = 792, sinks 4; router 5·24 + 5 = 125;
    # experts: gate and up 5·(24·40 + 40) = 5000, down 5·(20·24 + 24) = 2520; two norms 48: 10089; three layers 30267.
    # Embedding and head 480, final norm 24.
    assert read("gpt_oss").num_parameters == 30267 + 480 + 24


def test_deepseek_v3_by_hand() -> None:
    # Attention: q 24·9 + 9 + 9·4·(8+4) = 657, kv 24·(7+4) + 7 + 7·4·(8+5) = 635, o 4·5·24 = 480: 1772; two norms 48.
    # Layer 0: MLP 3·20·24 = 1440. Layers 1 and 2: experts 6·3·12·24 = 5184, router 6·24 = 144, shared 3·(2·12)·24 = 1728: 7056.
    # 3·(1772 + 48) + 1440 + 2·7056 = 21012; embedding and head 480, final norm 24.
    arch = read("deepseek_v3")
    assert arch.num_parameters == 21012 + 480 + 24
    assert [(b.layers, b.mlp.variant) for b in arch.blocks] == [((0,), "gated"), ((1, 2), "moe")]


def test_published_totals() -> None:
    # DeepSeek-V3's report: 671 B parameters without the layers for multi-token prediction. Its config, dimensions only.
    config: Config = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "vocab_size": 129280,
    }  # fmt: skip
    assert round(read_config(config, name="test").num_parameters / 1e9) == 671


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("deepseek_v3", {"head_dim": 6}, "head_dim"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok"),
        ("mixtral", {"num_experts_per_tok": 6}, "number of experts"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window"),
    ],
    ids=str,
)
def test_refuses_in_one_clear_line(model_type: str, changes: Config, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(model_type, **changes)
    assert "\n" not in str(caught.value)
