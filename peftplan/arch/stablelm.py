"""Rotary decoders with biased LayerNorms: StableLM (gated MLP, partial rotary) and StarCoder2 (plain MLP, biases everywhere).

Sources: transformers, `models/stablelm/modeling_stablelm.py`, `models/starcoder2/modeling_starcoder2.py`.
"""

from __future__ import annotations

from peftplan.arch.blocks import Block, Mlp
from peftplan.arch.decoder import Dims, attention_modules, decoder_backbone, gated_mlp, read_dims
from peftplan.arch.fields import Fields
from peftplan.arch.heads import classifier_dropout, decoder_model, equal_head_dim, partial_rotary_dim, probability
from peftplan.arch.modules import Architecture, Dropout, Module, layernorm, linear


def stablelm(c: Fields, task_type: str) -> Architecture:
    """StableLM: a quarter of a head rotated; `use_parallel_residual` drops the second norm; `qk_layernorm` norms head by head."""
    n = read_dims(c, kv=32)
    equal_head_dim(c, n.h, n.a)
    hidden = probability(c, "hidden_dropout")
    parallel = c.bool("use_parallel_residual", default=False)
    qk_norm = c.bool("qk_layernorm", default=False)
    backbone = decoder_backbone(
        c,
        n,
        stem="StableLm",
        layer=(
            *attention_modules(n, qkv_bias=c.bool("use_qkv_bias", default=False)),
            *(_head_norms(n) if qk_norm else ()),
            *gated_mlp(n.h, n.i, n.layers),
            *_norms(n, "input_layernorm", *(() if parallel else ("post_attention_layernorm",))),
        ),
        blocks=(
            Block(
                stack="decoder",
                layers=n.layers,
                attentions=(n.attention._replace(qk_norm=qk_norm),),
                mlp=Mlp("gated", n.i, c.str("hidden_act", default="silu")),
                norm="layernorm",
                parallel=parallel,
                shared_norm=parallel,
            ),
        ),
        rotary_dim=partial_rotary_dim(c, n.d, default=0.25),
        norm=layernorm("norm", n.h),
        dropout=Dropout(
            hidden, probability(c, "attention_dropout"), classifier=probability(c, "classifier_dropout", default=hidden)
        ),
    )
    return decoder_model(backbone, c, task_type)


def starcoder2(c: Fields, task_type: str) -> Architecture:
    """StarCoder2: `use_bias` is for q, k, v, o and the two matrices of the MLP; one window for all layers."""
    n = read_dims(c, kv=2)
    bias = c.bool("use_bias", default=True)
    backbone = decoder_backbone(
        c,
        n,
        stem="Starcoder2",
        layer=(
            *attention_modules(n, qkv_bias=bias, o_bias=bias),
            linear("layers.{}.mlp.c_fc", n.h, n.i, bias, n.layers),
            linear("layers.{}.mlp.c_proj", n.i, n.h, bias, n.layers),
            *_norms(n, "input_layernorm", "post_attention_layernorm"),
        ),
        blocks=(
            Block(
                stack="decoder",
                layers=n.layers,
                attentions=(n.attention._replace(window=c.optional_int("sliding_window")),),
                mlp=Mlp("plain", n.i, c.str("hidden_act", default="gelu_pytorch_tanh")),
                norm="layernorm",
            ),
        ),
        norm=layernorm("norm", n.h),
        dropout=Dropout(
            probability(c, "residual_dropout"),
            probability(c, "attention_dropout"),
            embedding=probability(c, "embedding_dropout"),
            classifier=classifier_dropout(c),
        ),
    )
    return decoder_model(backbone, c, task_type, tie_word_embeddings=True)


def _norms(n: Dims, *names: str) -> tuple[Module, ...]:
    return tuple(layernorm(f"layers.{{}}.{name}", n.h, layers=n.layers) for name in names)


def _head_norms(n: Dims) -> tuple[Module, ...]:
    """`StableLmLayerNormPerHead`: one LayerNorm without bias for each head of q, then of k."""
    return tuple(
        layernorm(f"layers.{{}}.self_attn.{side}_layernorm.norms.{head}", n.d, bias=False, layers=n.layers)
        for side, heads in (("q", n.a), ("k", n.kv))
        for head in range(heads)
    )
