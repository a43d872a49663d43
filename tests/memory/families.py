"""Small models of seven families, of which every size can be told from every other by its number."""

from __future__ import annotations

from typing import Any

B, S, R = 3, 136, 13
SIZES = {"b": B, "s": S, "r": R, "d": 16, "i": 464, "v": 1009}
"""Named sizes such that no product of some is another, or a product of others: a dim says which sizes it is made of."""
GROUPED = {**SIZES, "h": 440, "g": 5, "n": 2}
"""5 key/value heads, each read by 2 query heads."""
HEADS = {**SIZES, "a": 19}
"""Hidden states are 19 heads wide."""

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 440,
    "head_dim": 16,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "intermediate_size": 464,
    "num_hidden_layers": 2,
    "vocab_size": 1009,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 304,
    "n_head": 19,
    "n_inner": 464,
    "n_layer": 2,
    "vocab_size": 1009,
    "n_positions": 512,
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "hidden_size": 304,
    "num_attention_heads": 19,
    "intermediate_size": 464,
    "num_hidden_layers": 2,
    "vocab_size": 1009,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 304,
    "d_ff": 464,
    "d_kv": 16,
    "num_heads": 23,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "vocab_size": 1009,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "is_encoder_decoder": True,
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": (LLAMA, GROUPED),
    "qwen3": ({**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, GROUPED),
    "gemma": (
        {**LLAMA, "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "tie_word_embeddings": True},
        GROUPED,
    ),
    "gpt2": (GPT2, HEADS),
    "mixtral": (
        {
            **LLAMA,
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 11,
            "num_experts_per_tok": 7,
        },
        {**GROUPED, "e": 11, "k": 7},
    ),
    "bert": (BERT, HEADS),
    "t5": (T5, {**SIZES, "a": 23, "h": 304}),
}
