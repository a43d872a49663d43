"""Decoders with ALiBi in place of position embeddings, and with fused query, key and value projections: BLOOM and MPT.

Sources: transformers, `models/<model_type>/modeling_<model_type>.py` and the config class's defaults beside it. Both
classes have eager attention only (`_supports_sdpa` is unset).
"""

from __future__ import annotations

from collections.abc import Mapping

from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, classifier_dropout, decoder_model, equal_head_dim, probability, prompt_dims
from peftplan.arch.modules import Architecture, Dropout, embedding, layernorm, linear
from peftplan.errors import InputError, RefusedError

MLP_RATIO = 4
"""`BloomMLP` and `MptMLP` write 4 × hidden_size into the code."""

MPT_MAX_SEQ_LEN = 2048
MPT_FIXED: Mapping[str, object] = {"expansion_ratio": MLP_RATIO, "no_bias": True}
MPT_ATTENTION_FIXED: Mapping[str, object] = {
    "attn_type": "multihead_attention",
    "alibi": True,
    "qk_ln": False,
    "prefix_lm": False,
    "attn_uses_sequence_id": False,
}
"""Values that transformers' MPT hard-codes. It ignores the config's, so it cannot run a checkpoint trained with others."""


def bloom(c: Fields, task_type: str) -> Architecture:
    """BLOOM and BLOOMZ: biases everywhere, a norm on the embedding.

    h hidden_size, v vocab_size, a heads, d head_dim. `n_embed`, an older name, wins over `hidden_size`.
    """
    h, v, a = c.int("n_embed", "hidden_size"), c.int("vocab_size"), c.int("n_head", "num_attention_heads")
    i = MLP_RATIO * h
    layers = c.layers("n_layer", "num_hidden_layers")
    hidden = probability(c, "hidden_dropout")
    # `GeLUFunction`, an autograd function that saves only its input, unlike every entry of ACT2FN.
    mlp = Mlp("plain", i, "bloom_gelu")
    backbone = Backbone(
        model_type=c.str("model_type"),
        stem="Bloom",
        prefix="transformer",
        modules=(
            embedding("word_embeddings", v, h),
            layernorm("word_embeddings_layernorm", h),
            layernorm("h.{}.input_layernorm", h, layers=layers),
            linear("h.{}.self_attention.query_key_value", h, 3 * h, True, layers),
            linear("h.{}.self_attention.dense", h, h, True, layers),
            layernorm("h.{}.post_attention_layernorm", h, layers=layers),
            linear("h.{}.mlp.dense_h_to_4h", h, i, True, layers),
            linear("h.{}.mlp.dense_4h_to_h", i, h, True, layers),
            layernorm("ln_f", h),
        ),
        blocks=(_block(layers, _alibi(c, h, a), mlp),),
        hidden_size=h,
        vocab_size=v,
        embedding="word_embeddings",
        prompt=prompt_dims(c, len(layers), h, a),
        supports_sdpa=False,
        supports_flash_attn=False,
        dropout=Dropout(
            hidden, probability(c, "attention_dropout"), classifier=probability(c, "classifier_dropout", default=hidden)
        ),
    )
    return decoder_model(backbone, c, task_type, tie_word_embeddings=True, token_cls="classifier")


def mpt(c: Fields, task_type: str) -> Architecture:
    """MPT: no biases, not even in the norms. h d_model, v vocab_size, a heads, d head_dim."""
    dropped = probability(of_attention := _refuse_ignored(c), "attn_pdrop")
    h, v, a = c.int("d_model", "hidden_size"), c.int("vocab_size"), c.int("n_heads", "num_attention_heads")
    i = MLP_RATIO * h
    attention = _alibi(c, h, a)._replace(alibi_length=c.int("max_seq_len", default=MPT_MAX_SEQ_LEN))
    attention = attention._replace(clipped=bool(of_attention.raw.get("clip_qkv")))
    layers = c.layers("n_layers", "num_hidden_layers")
    backbone = Backbone(
        model_type=c.str("model_type"),
        stem="Mpt",
        prefix="transformer",
        modules=(
            embedding("wte", v, h),
            layernorm("blocks.{}.norm_1", h, False, layers),
            linear("blocks.{}.attn.Wqkv", h, 3 * h, layers=layers),
            linear("blocks.{}.attn.out_proj", h, h, layers=layers),
            layernorm("blocks.{}.norm_2", h, False, layers),
            linear("blocks.{}.ffn.up_proj", h, i, layers=layers),
            linear("blocks.{}.ffn.down_proj", i, h, layers=layers),
            layernorm("norm_f", h, False),
        ),
        blocks=(_block(layers, attention, Mlp("plain", i, "gelu")),),
        hidden_size=h,
        vocab_size=v,
        embedding="wte",
        prompt=prompt_dims(c, len(layers), h, None),
        supports_sdpa=False,
        supports_flash_attn=False,
        # `attn_pdrop` applies to attention weights and after both sublayers; resid_pdrop and emb_pdrop are never read.
        dropout=Dropout(dropped, dropped, classifier=classifier_dropout(c)),
    )
    return decoder_model(backbone, c, task_type, tie_word_embeddings=True, token_cls="classifier")


def _alibi(c: Fields, h: int, a: int) -> Attention:
    return Attention(a, a, equal_head_dim(c, h, a), positions="alibi", fused_qkv=True)


def _block(layers: tuple[int, ...], attention: Attention, mlp: Mlp) -> Block:
    return Block("decoder", layers, (attention,), mlp, "layernorm")


def _refuse_ignored(c: Fields) -> Fields:
    """The fields of `attn_config`. Raises RefusedError if an MPT config states what transformers' classes ignore."""
    attention = c.raw.get("attn_config") or {}
    if not isinstance(attention, Mapping):
        raise InputError(f"{c.name}: attn_config", attention, "accepted: an object with fields such as attn_type")
    for fields, fixed in ((c.raw, MPT_FIXED), (attention, MPT_ATTENTION_FIXED)):
        for field, only in fixed.items():
            if fields.get(field, only) != only:
                raise RefusedError(f"{c.name}: {field} is {fields[field]!r}, but transformers' MPT classes always take {only!r}")
    return Fields(attention, name=f"{c.name}: attn_config")
