"""GPT-2, GPT-BigCode, GPT-J, Phi, GPT-NeoX, OPT, BLOOM, MPT and Falcon: variants that the built-in models do not show."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.arch.modules import Architecture
from peftplan.arch.readers import read_config
from peftplan.dtypes import parse_dtype
from peftplan.errors import InputError, RefusedError, UnknownNameError

Config = dict[str, Any]

BASE: dict[str, Config] = {
    "gpt2": {"n_embd": 12, "n_layer": 2, "n_head": 3, "vocab_size": 10, "n_positions": 8},
    "gpt_bigcode": {"n_embd": 12, "n_layer": 2, "n_head": 3, "vocab_size": 10, "n_positions": 8},
    "gptj": {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 10, "n_positions": 8, "rotary_dim": 4},
    "phi": {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10, "intermediate_size": 20,
    },
    "gpt_neox": {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10, "intermediate_size": 20,
    },
    "opt": {
        "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 10, "ffn_dim": 20,
        "max_position_embeddings": 8,
    },
    "bloom": {"hidden_size": 12, "n_layer": 2, "n_head": 3, "vocab_size": 10},
    "mpt": {"d_model": 12, "n_layers": 2, "n_heads": 3, "vocab_size": 10, "max_seq_len": 8},
    "falcon": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 12},
}  # fmt: skip

VARIANTS: dict[str, list[Config]] = {
    "gpt2": [{}, {"n_inner": 20}, {"tie_word_embeddings": False}, {"num_key_value_heads": 3, "activation_function": "relu"}],
    "gpt_bigcode": [{}, {"multi_query": False}, {"n_inner": 20, "tie_word_embeddings": False}],
    "gptj": [{}, {"n_inner": 20}, {"tie_word_embeddings": True}, {"rotary_dim": 5}],
    "phi": [
        {},
        {"num_key_value_heads": 1},
        {"head_dim": 8, "partial_rotary_factor": 1.0},
        {"qk_layernorm": True, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.34}},
    ],
    "gpt_neox": [
        {},
        {"attention_bias": False, "rotary_pct": 1.0},
        {"tie_word_embeddings": True, "use_parallel_residual": False},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_pct": 0.5},
    ],
    "opt": [
        {},
        {"word_embed_proj_dim": 6, "do_layer_norm_before": False},
        {"word_embed_proj_dim": 6, "tie_word_embeddings": False, "num_labels": 5},
        {"enable_bias": False, "_remove_final_layer_norm": True},
        {"layer_norm_elementwise_affine": False},
    ],
    "bloom": [{}, {"tie_word_embeddings": False}, {"n_embed": 24}, {"apply_residual_connection_post_layernorm": True}],
    "mpt": [{}, {"tie_word_embeddings": False}, {"attn_config": {"alibi": True, "clip_qkv": 6.0, "alibi_bias_max": 16}}],
    "falcon": [
        {},
        {"multi_query": False, "bias": True},
        {"multi_query": None, "alibi": True},
        {"parallel_attn": False, "alibi": True, "ffn_hidden_size": 20},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        {"tie_word_embeddings": False, "num_ln_in_parallel_attn": 1},
    ],
}

TASKS = dict.fromkeys(BASE, ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"))
TASKS["gptj"] = TASKS["opt"] = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")


def config_of(model_type: str, **changes: Any) -> Config:
    return {"model_type": model_type, **BASE[model_type], **changes}


def read(model_type: str, task_type: str = "CAUSAL_LM", **changes: Any) -> Architecture:
    return read_config(config_of(model_type, **changes), name="test", task_type=task_type)


@pytest.mark.parametrize(
    ("model_type", "changes", "task_type"),
    [(m, v, t) for m, variants in VARIANTS.items() for v in variants for t in TASKS[m]],
    ids=str,
)
def test_is_the_real_model(model_type: str, changes: Config, task_type: str) -> None:
    pytest.importorskip("transformers")
    from tests.arch.meta import assert_same, build

    arch = read(model_type, task_type, **changes)
    model = build(config_of(model_type, **changes), arch.model_class)
    assert_same(arch, model)
    assert arch.supports_sdpa == bool(model._supports_sdpa)
    assert {b.name: b.dtype for b in arch.buffers} == {n: parse_dtype(b.dtype) for n, b in model.named_buffers()}


@pytest.mark.parametrize(("model_type", "changes"), [(m, v) for m, variants in VARIANTS.items() for v in variants], ids=str)
def test_prompt_dims_are_what_peft_reads(model_type: str, changes: Config) -> None:
    pytest.importorskip("peft")
    from peft import PrefixTuningConfig, PromptTuningConfig
    from peft.utils.other import _prepare_prompt_learning_config
    from transformers import AutoConfig

    config = AutoConfig.for_model(**config_of(model_type, **changes))
    prompt = read(model_type, **changes).prompt
    assert prompt is not None
    if prompt.num_attention_heads is None:
        with pytest.raises(ValueError, match="num_attention_heads"):
            _prepare_prompt_learning_config(PromptTuningConfig(num_virtual_tokens=1), config)
        return
    soft = _prepare_prompt_learning_config(PromptTuningConfig(num_virtual_tokens=1), config)
    assert (soft.num_layers, soft.token_dim) == (prompt.num_layers, prompt.token_dim)
    assert soft.num_attention_heads == prompt.num_attention_heads
    prefix = _prepare_prompt_learning_config(PrefixTuningConfig(num_virtual_tokens=1), config)
    if prompt.num_key_value_heads is None:
        assert prefix.token_dim == prompt.token_dim
    else:
        d = prompt.head_dim or prompt.token_dim // prompt.num_attention_heads
        assert (prefix.num_attention_heads, prefix.token_dim) == (prompt.num_key_value_heads, prompt.num_key_value_heads * d)


@pytest.mark.parametrize(
    "changes",
    [
        {"new_decoder_architecture": True, "parallel_attn": False},
        {"new_decoder_architecture": True, "parallel_attn": False, "num_ln_in_parallel_attn": 1},
        {"num_ln_in_parallel_attn": 2},
        {"multi_query": False, "num_kv_heads": 2},
    ],
    ids=str,
)
def test_falcons_that_cannot_run_are_refused(changes: Config) -> None:
    with pytest.raises(RefusedError):
        read("falcon", **changes)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.FalconForCausalLM(transformers.AutoConfig.for_model(**config_of("falcon", **changes)))
    with pytest.raises((AttributeError, UnboundLocalError, RuntimeError)):
        model(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize(("new", "norms"), [(False, 1), (True, 1), (True, 2)])
def test_parallel_halves_share_a_norm_or_not(new: bool, norms: int) -> None:
    """The real model's norms, called once each, see the layer's input: one of them or two."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    changes = {"new_decoder_architecture": new, "num_ln_in_parallel_attn": norms, "num_kv_heads": 4}
    (block,) = read("falcon", **changes).blocks
    assert (block.parallel, block.shared_norm) == (True, norms == 1)
    model = transformers.FalconModel(transformers.AutoConfig.for_model(**config_of("falcon", **changes)))
    seen: list[Any] = []
    for module in model.h[0].children():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    model(torch.zeros(1, 4, dtype=torch.int64))
    assert len(seen) == norms
    assert all(x is seen[0] for x in seen)


def test_gpt2_by_hand() -> None:
    # v 10, p 8, h 12, i 4·12 = 48, two layers, lm_head tied:
    # embeddings 10·12 + 8·12 = 216
    # layer: two norms 2·24 = 48; c_attn 12·36 + 36 = 468; attn.c_proj 12·12 + 12 = 156;
    #        c_fc 12·48 + 48 = 624; mlp.c_proj 48·12 + 12 = 588; together 1,884
    # final norm 24
    assert read("gpt2").num_parameters == 216 + 2 * 1884 + 24 == 4008


def test_falcon_40b_by_hand() -> None:
    # h 8192, 128 heads of 64, 8 kv heads, i 32768, v 65024, 60 layers, no biases, lm_head tied:
    # qkv 8192·(128 + 16)·64 = 75,497,472; dense 67,108,864; MLP 2·8192·32768 = 536,870,912; two norms 32,768 → 679,510,016
    # 60 layers 40,770,600,960 + embedding 65024·8192 = 532,676,608 + final norm 16,384
    config = {
        "model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8,
        "vocab_size": 65024, "new_decoder_architecture": True,
    }  # fmt: skip
    arch = read_config(config, name="falcon-40b")
    assert arch.num_parameters == 41_303_293_952
    assert {m.kind for m in arch.modules if m.layers} == {"LinearSubclass", "LayerNorm"}


def test_opt_350m_narrow_embedding_by_hand() -> None:
    # v 10, e 6, h 12, p 8 + 2, i 20, norms after, so no final norm; the head is e wide and tied
    # embeddings 60 + 120; projections 2·72 = 144
    # layer: q, k, v, o 4·(144 + 12) = 624; two norms 48; fc1 240 + 20; fc2 240 + 12 → 1,184
    arch = read("opt", word_embed_proj_dim=6, do_layer_norm_before=False)
    assert arch.num_parameters == 60 + 120 + 144 + 2 * 1184 == 2692
    assert arch.blocks[0].norm_position == "post"


@pytest.mark.parametrize(
    ("model_type", "changes", "kv", "positions"),
    [
        ("gpt2", {}, 3, "learned"),
        ("gpt_bigcode", {}, 1, "learned"),
        ("gptj", {}, 2, "rotary"),
        ("phi", {"num_key_value_heads": 1}, 1, "rotary"),
        ("opt", {}, 3, "learned"),
        ("bloom", {}, 3, "alibi"),
        ("mpt", {}, 3, "alibi"),
        ("falcon", {}, 1, "rotary"),
        ("falcon", {"alibi": True, "multi_query": False}, 4, "alibi"),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 2, "rotary"),
    ],
)
def test_attention_of_a_block(model_type: str, changes: Config, kv: int, positions: str) -> None:
    (attention,) = read(model_type, **changes).blocks[0].attentions
    assert (attention.num_key_value_heads, attention.positions) == (kv, positions)


@pytest.mark.parametrize("stated", ["GPT2LMHeadModel", "GPT2DoubleHeadsModel"])
def test_gpt2_class_names(stated: str) -> None:
    # AutoModelForCausalLM loads a checkpoint of GPT2DoubleHeadsModel as GPT2LMHeadModel.
    assert read_config(config_of("gpt2", architectures=[stated]), name="gpt2").model_class == "GPT2LMHeadModel"
    assert read("gpt2", "FEATURE_EXTRACTION").model_class == "GPT2Model"


@pytest.mark.parametrize(
    ("model_type", "changes", "error"),
    [
        ("gpt2", {"add_cross_attention": True}, RefusedError),
        ("gpt2", {"n_head": 5}, InputError),
        ("gpt2", {"n_embd": None}, InputError),
        ("gptj", {"rotary_dim": 64}, InputError),
        ("gpt_neox", {"head_dim": 8}, InputError),
        ("gpt_neox", {"rope_parameters": 3}, InputError),
        ("phi", {"qk_layernorm": True, "head_dim": 8}, RefusedError),
        ("mpt", {"no_bias": False}, RefusedError),
        ("mpt", {"expansion_ratio": 8}, RefusedError),
        ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, RefusedError),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}, InputError),
        ("bloom", {"n_head": "three"}, InputError),
    ],
)
def test_refuses(model_type: str, changes: Config, error: type[Exception]) -> None:
    with pytest.raises(error):
        read(model_type, **changes)


@pytest.mark.parametrize("model_type", ["gptj", "opt"])
def test_refuses_a_task_without_a_class(model_type: str) -> None:
    with pytest.raises(UnknownNameError):
        read(model_type, "TOKEN_CLS")
