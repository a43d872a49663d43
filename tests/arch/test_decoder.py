"""Llama-like decoders (llama*.py, gemma.py, cohere.py, stablelm.py): variants that the built-in models do not show."""

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
    "pad_token_id": 0,
}
SLIDING = ["sliding_attention", "full_attention", "full_attention"]
WIDE_HEADS: Config = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}

VARIANTS: dict[str, list[Config]] = {
    "llama": [{"attention_bias": True, "mlp_bias": True}, {"head_dim": 8, "tie_word_embeddings": True}],
    "mistral": [{}, {"sliding_window": None, "head_dim": None}, {"head_dim": 8, "tie_word_embeddings": True}],
    "qwen2": [
        {"tie_word_embeddings": True},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {"use_sliding_window": True, "layer_types": SLIDING},
    ],
    "qwen3": [
        {"attention_bias": True, "head_dim": 8},
        {},
        {"use_sliding_window": True, "max_window_layers": 0, "tie_word_embeddings": True},
    ],
    "gemma": [{"attention_bias": True, "tie_word_embeddings": False}, WIDE_HEADS, {"use_bidirectional_attention": True}],
    "gemma2": [
        {"attention_bias": True, "tie_word_embeddings": False, "head_dim": 8},
        {**WIDE_HEADS, "layer_types": SLIDING, "sliding_window": 8},
        {"final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": True},
    ],
    "gemma3_text": [
        {"attention_bias": True, "tie_word_embeddings": False, "head_dim": 8, "sliding_window_pattern": 2},
        {"layer_types": SLIDING, "sliding_window": 9, "use_bidirectional_attention": True},
        {"layer_types": ["full_attention"] * 3, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        WIDE_HEADS,
    ],
    "phi3": [
        {"tie_word_embeddings": True, "num_key_value_heads": None},
        {"head_dim": 8, "partial_rotary_factor": 0.5, "sliding_window": 8},
        {"partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope", "short_factor": [1, 1], "long_factor": [1, 1]}},
    ],
    "starcoder2": [{"use_bias": False, "tie_word_embeddings": False}, {"sliding_window": 8, "head_dim": 8}, {"head_dim": None}],
    "stablelm": [
        {"use_qkv_bias": True, "use_parallel_residual": True},
        {"qk_layernorm": True, "tie_word_embeddings": True},
        {"partial_rotary_factor": 1.0, "qk_layernorm": True, "use_parallel_residual": True},
    ],
    "cohere": [
        {"attention_bias": True, "use_qk_norm": True},
        {"tie_word_embeddings": False, "head_dim": 8, "use_qk_norm": True},
        {"num_key_value_heads": None},
    ],
    "cohere2": [
        {"attention_bias": True, "sliding_window_pattern": 2},
        {"tie_word_embeddings": False, "head_dim": 8},
        {"num_key_value_heads": None, "layer_types": SLIDING, "sliding_window": 8},
    ],
    "olmo": [
        {"attention_bias": True, "tie_word_embeddings": True},
        {"num_key_value_heads": None, "clip_qkv": 8.0},
        {"head_dim": 8},
    ],
    "olmo2": [{"attention_bias": True, "tie_word_embeddings": True}, {"num_key_value_heads": None}, {"head_dim": 8}],
    "granite": [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True, "head_dim": 8},
        {"num_key_value_heads": None},
    ],
    "smollm3": [
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "no_rope_layer_interval": 2},
        {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0, 1]},
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": SLIDING, "num_key_value_heads": None},
    ],
    "glm": [{"attention_bias": False, "head_dim": 8}, {"tie_word_embeddings": True, "partial_rotary_factor": 0.3}],
    "glm4": [
        {"attention_bias": False, "head_dim": 8},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3}, **WIDE_HEADS},
    ],
    "ministral3": [{}, {"sliding_window": 8, "head_dim": 8}, {"tie_word_embeddings": True}],
    "seed_oss": [{}, {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "head_dim": 8}],
    "hunyuan_v1_dense": [{"attention_bias": True, "head_dim": 8}, {"num_key_value_heads": None, "head_dim": 6}],
    "exaone4": [
        {"sliding_window_pattern": 2},
        {"sliding_window": 8, "sliding_window_pattern": "LLG", "layer_types": SLIDING, "tie_word_embeddings": True},
        {"sliding_window": None, "layer_types": ["full_attention"] * 3, "head_dim": 8},
    ],
    "arcee": [{"attention_bias": True, "mlp_bias": True}, {"head_dim": 8, "num_key_value_heads": None}],
    "apertus": [{}, {"attention_bias": True, "hidden_act": "relu2", "tie_word_embeddings": True}],
    "ernie4_5": [{}, {"use_bias": True, "tie_word_embeddings": False, "head_dim": 8}],
}  # fmt: skip

NO_TOKEN_CLS = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
BARE = ("CAUSAL_LM", "FEATURE_EXTRACTION")
TASKS = dict.fromkeys(VARIANTS, ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"))
TASKS |= dict.fromkeys(("gemma3_text", "olmo", "olmo2", "hunyuan_v1_dense"), NO_TOKEN_CLS)
TASKS |= {"apertus": ("CAUSAL_LM", "TOKEN_CLS", "FEATURE_EXTRACTION")}
TASKS |= dict.fromkeys(("cohere", "cohere2", "granite", "ernie4_5"), BARE)

EVERY_VARIANT = [(m, v) for m, variants in VARIANTS.items() for v in variants]


def config_of(model_type: str, **changes: Any) -> Config:
    return {"model_type": model_type, **TINY, **changes}


def without(config: Config, *names: str) -> Config:
    return {key: value for key, value in config.items() if key not in names}


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
            read(model_type, task_type, **VARIANTS[model_type][0])


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


@pytest.mark.parametrize(
    ("model_type", "heads"),
    [("mistral", 8), ("qwen2", 32), ("qwen3", 32), ("gemma", 16), ("gemma2", 4), ("gemma3_text", 4), ("starcoder2", 4),
     ("stablelm", 32), ("cohere", 4), ("olmo2", 4), ("smollm3", 8), ("glm4", 4)],
)  # fmt: skip
def test_a_config_without_key_value_heads_has_the_class_default(model_type: str, heads: int) -> None:
    pytest.importorskip("transformers")
    from tests.arch.meta import assert_prompt, assert_task

    config = without(config_of(model_type, hidden_size=64, num_attention_heads=heads), "num_key_value_heads")
    assert_prompt(assert_task(config, "CAUSAL_LM"), config)


def assert_attention_is_real(attention: Any, real: Any, *, window: int | None) -> None:
    """A block's attention against the attributes of transformers' attention module."""
    assert attention.window == window
    assert attention.head_dim == real.head_dim
    assert attention.causal == real.is_causal
    assert attention.num_attention_heads // attention.num_key_value_heads == real.num_key_value_groups
    assert attention.qk_norm == any(hasattr(real, name) for name in ("q_norm", "q_layernorm", "query_layernorm"))
    assert attention.softcap == (getattr(real, "attn_logit_softcapping", None) is not None)
    assert (attention.positions == "rotary") == bool(getattr(real, "use_rope", True))
    assert attention.fused_qkv == hasattr(real, "qkv_proj")


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
        if model_type == "cohere2":  # positions in the sliding layers only: Cohere2Attention.forward
            real.self_attn.use_rope = real.self_attn.sliding_window is not None
        if model_type == "exaone4":  # the same beside layers without a window: Exaone4Attention.forward
            sliding, real.self_attn.use_rope = real.self_attn.is_sliding, True
            if real.self_attn.sliding_window is not None and not sliding:
                real.self_attn.sliding_window, real.self_attn.use_rope = None, False
        if model_type == "apertus":
            real.input_layernorm, real.post_attention_layernorm = real.attention_layernorm, real.feedforward_layernorm
            del real.attention_layernorm, real.feedforward_layernorm
        # Mistral, Phi-3 and StarCoder2 read one window from the config in forward; the others store it in the module.
        window = getattr(real.self_attn, "sliding_window", getattr(model.config, "sliding_window", None))
        assert_attention_is_real(block.attentions[0], real.self_attn, window=window)
        activation = getattr(real.mlp, "act_fn", None) or getattr(real.mlp, "activation_fn", None) or real.mlp.act
        assert type(activation) is type(_activation(block.mlp.activation))
        assert block.mlp.fused_gate_up == hasattr(real.mlp, "gate_up_proj")
        assert (block.mlp.variant == "plain") == (not hasattr(real.mlp, "gate_proj") and not block.mlp.fused_gate_up)
        assert block.norm == ("rmsnorm" if "RMS" in type(model.model.norm).__name__ else "layernorm")
        assert block.parallel == block.shared_norm == (getattr(real, "post_attention_layernorm", None) is None)
        norms = sum("Norm" in type(child).__name__ for child in real.children())
        assert (block.norm_position == "sandwich") == (norms == 4)
        assert (block.norm_position == "post") == (norms == 2 and not hasattr(real, "input_layernorm"))


def _activation(name: str) -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def test_legacy_gelu_of_gemma_is_its_tanh_form() -> None:
    assert read("gemma", hidden_act="gelu").blocks[0].mlp.activation == "gelu_pytorch_tanh"


def test_logits_are_scaled_or_capped_only_by_the_language_model() -> None:
    assert read("granite").logits_ops == read("cohere").logits_ops == read("cohere2").logits_ops == ("scale",)
    assert read("gemma2").logits_ops == read("gemma3_text", final_logit_softcapping=30.0).logits_ops == ("softcap",)
    assert read("gemma2", final_logit_softcapping=None).logits_ops == read("gemma3_text").logits_ops == ()
    assert read("gemma2", "SEQ_CLS").logits_ops == read("llama").logits_ops == ()


def test_phi3_by_hand() -> None:
    # h 24, i 20, 4 heads of 6, 2 key/value heads, v 10. A layer: o 24·24 = 576, qkv (4 + 2·2)·6·24 = 1152,
    # gate and up 2·20·24 = 960, down 24·20 = 480, two norms 48: 3216; three layers 9648.
    # Embedding and head 2·10·24 = 480, final norm 24.
    assert read("phi3").num_parameters == 9648 + 480 + 24


def test_gemma2_by_hand() -> None:
    # h 24, i 20, 4 heads of 8, 2 key/value heads, v 10. A layer: q and o 2·24·32 = 1536, k and v 2·16·24 = 768,
    # MLP 3·20·24 = 1440, four norms 96: 3840; three layers 11520. The head is tied: 10·24 = 240 once. Final norm 24.
    assert read("gemma2", head_dim=8).num_parameters == 11520 + 240 + 24


def test_stablelm_norms_head_by_head() -> None:
    # 4 query heads and 2 key heads, 6 each: 36 weights a layer, 108 in three.
    assert read("stablelm", qk_layernorm=True).num_parameters - read("stablelm").num_parameters == 108


def test_olmo_has_no_norm_parameters() -> None:
    # Llama has two norms in each of three layers and a final one: 7·24 = 168.
    assert read("llama").num_parameters - read("olmo").num_parameters == 168


def test_gemma3_alternates_windows() -> None:
    blocks = read("gemma3_text", num_hidden_layers=8, sliding_window=8).blocks
    assert [(b.layers, b.attentions[0].window) for b in blocks] == [((0, 1, 2, 3, 4, 6, 7), 8), ((5,), None)]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gemma2", {"layer_types": ["full_attention"]}, "3 entries"),
        ("gemma2", {"layer_types": ["linear_attention"] * 3}, "full_attention or sliding_attention"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("qwen2", {"layer_types": SLIDING}, "sliding_window"),
        ("llama", {"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "multiple of num_attention_heads"),
        ("stablelm", {"head_dim": 8}, "head_dim"),
        ("smollm3", {"no_rope_layers": [1]}, "at least 3"),
        ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping"),
    ],
    ids=str,
)
def test_refuses_in_one_clear_line(model_type: str, changes: Config, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(model_type, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("model_type", VARIANTS)
def test_its_own_dimensions_are_required(model_type: str, field: str) -> None:
    with pytest.raises(InputError, match=field):
        read_config(without(config_of(model_type), field), name="test")
