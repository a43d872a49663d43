"""Small models of many shapes, as ours and as transformers': what the method tests compare on."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import peft
import torch
import transformers

from peftplan.arch.modules import Architecture
from peftplan.arch.readers import read_config
from peftplan.methods import METHODS, adapt, configure
from peftplan.methods.adaptation import Adaptation
from tests.arch import meta
from tests.methods import witness

_WIDE: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 96,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _WIDE | {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2": _WIDE | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": _WIDE | {"num_key_value_heads": 3, "head_dim": 16, "tie_word_embeddings": True},
    "mistral": _WIDE | {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 32, "vocab_size": 96},
    "gpt_bigcode": {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 32, "vocab_size": 96},
    "gptj": {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 32, "vocab_size": 96, "rotary_dim": 4},
    "gpt_neox": _WIDE | {"max_position_embeddings": 32},
    "phi": _WIDE | {"max_position_embeddings": 32},
    "opt": {"hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 96,
            "word_embed_proj_dim": 48, "max_position_embeddings": 32},
    "bloom": {"hidden_size": 48, "n_layer": 3, "n_head": 6, "vocab_size": 96},
    "mpt": {"d_model": 48, "n_layers": 3, "n_heads": 6, "vocab_size": 96},
    "falcon": {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 96},
    "bert": _WIDE | {"max_position_embeddings": 32},
    "roberta": _WIDE | {"max_position_embeddings": 32},
    "deberta-v2": _WIDE | {"max_position_embeddings": 32},
    "distilbert": {"dim": 48, "hidden_dim": 80, "n_layers": 3, "n_heads": 6, "vocab_size": 96, "max_position_embeddings": 32},
    "t5": {"d_model": 48, "d_kv": 8, "d_ff": 80, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 6, "vocab_size": 96},
    "bart": {"d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 6, "decoder_attention_heads": 6,
             "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "vocab_size": 96, "max_position_embeddings": 32},
    "whisper": {"d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 6,
                "decoder_attention_heads": 6, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "vocab_size": 96, "pad_token_id": 0,
                "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    "vit": {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "image_size": 32},
    "mixtral": _WIDE | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": _WIDE | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _WIDE | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
                          "shared_expert_intermediate_size": 56},
    "qwen3_moe": _WIDE | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
                          "head_dim": 8},
    "deepseek_v3": _WIDE | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "q_lora_rank": 12,
                            "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
                            "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 6, "n_group": 1,
                            "topk_group": 1},
}  # fmt: skip

PEFT_TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


def config_of(model: str) -> dict[str, Any]:
    """The parsed config.json of a small model, completed by transformers as `save_pretrained` writes it."""
    return dict(transformers.AutoConfig.for_model(model, **CONFIGS[model]).to_dict())


@cache
def architecture(model: str, task: str | None = None) -> Architecture:
    """Ours."""
    return read_config(config_of(model), name=model, task_type=task)


@cache
def real(model: str, task: str | None = None, device: str = "meta") -> Any:
    """transformers' own."""
    arch = architecture(model, task)
    if device == "meta":
        return meta.build(config_of(model), arch.model_class)
    config = transformers.AutoConfig.for_model(model, **CONFIGS[model])
    return getattr(transformers, arch.model_class)._from_config(config)


def ours(model: str, method: str, task: str | None = None, **options: Any) -> Adaptation:
    """The adaptation that peftplan states; `target_modules` None means peft's own mapping here."""
    if METHODS[method].peft_type == "LORA":
        options.setdefault("target_modules", "peft-default")
    return adapt(architecture(model, task), *configure(method, options))


def assert_like_peft(model: str, method: str, task: str | None = None, *, device: str = "meta", **options: Any) -> Adaptation:
    """Our adaptation has peft's tensors, name by name; `options` are given to both, by peft's own names."""
    adaptation = ours(model, method, task, **options)
    adapted = peft_of(model, method, task, device=device, **options)
    witness.assert_same(architecture(model, task), adaptation, real(model, task, device), adapted)
    return adaptation


def peft_of(model: str, method: str, task: str | None = None, *, device: str = "meta", **options: Any) -> Any:
    """peft's own model."""
    arch = architecture(model, task)
    peft_type = METHODS[method].peft_type
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)]
    task_type = arch.task_type if arch.task_type in PEFT_TASKS else None
    if task_type is None and "num_virtual_tokens" in options:
        task_type = "FEATURE_EXTRACTION"  # virtual tokens need one of peft's tasks, and a masked LM has none
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_class(task_type=task_type, **{**METHODS[method].defaults, **options})
        return witness.peft_model(real(model, task, device), config, device=device)


def total(tensors: Any) -> int:
    """Elements of all copies."""
    return sum(t.copies * torch.Size(t.shape).numel() for t in tensors)
