"""Falcon: multi-query (7B), grouped-query (40B, 180B) or plain attention, parallel or serial layers, ALiBi or rotary.

Source: transformers, `models/falcon/modeling_falcon.py` and `configuration_falcon.py`. Its linear layers are `FalconLinear`,
a subclass of `nn.Linear`; the rotary tables are buffers even with ALiBi.
"""

from __future__ import annotations

from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, decoder_model, probability, prompt_dims, rotary_buffers
from peftplan.arch.modules import Architecture, Dropout, Module, embedding, layernorm, linear
from peftplan.errors import RefusedError


def falcon(c: Fields, task_type: str) -> Architecture:
    """Falcon 1. h hidden_size, i ffn_hidden_size, v vocab_size, a query heads, d head_dim."""
    h, v, a = c.int("n_embed", "hidden_size"), c.int("vocab_size"), c.int("num_attention_heads")
    d = c.divide("hidden_size", h, "num_attention_heads", a)
    i = c.int("ffn_hidden_size", default=4 * h)
    layers = c.layers("num_hidden_layers")
    kv = _key_value_heads(c, a)
    bias = _flag(c, "bias", default=False)
    norms, parallel = _norms(c)

    def layer(name: str, n_in: int, n_out: int) -> Module:
        plain = linear(f"h.{{}}.{name}", n_in, n_out, bias, layers)
        return Module(plain.name, "LinearSubclass", plain.params, layers)

    alibi, new = _flag(c, "alibi", default=False), _flag(c, "new_decoder_architecture", default=False)
    hidden = probability(c, "hidden_dropout")
    backbone = Backbone(
        model_type=c.str("model_type"),
        stem="Falcon",
        prefix="transformer",
        modules=(
            embedding("word_embeddings", v, h),
            layer("self_attention.query_key_value", h, (a + 2 * kv) * d),
            layer("self_attention.dense", h, h),
            layer("mlp.dense_h_to_4h", h, i),
            layer("mlp.dense_4h_to_h", i, h),
            *(layernorm(f"h.{{}}.{norm}", h, layers=layers) for norm in norms),
            layernorm("ln_f", h),
        ),
        blocks=(
            Block(
                stack="decoder",
                layers=layers,
                attentions=(
                    Attention(
                        a, kv, d, positions="alibi" if alibi else "rotary", fused_qkv=True, cached_heads=a if new else None
                    ),
                ),
                mlp=Mlp("plain", i, c.str("activation", default="gelu")),
                norm="layernorm",
                parallel=parallel,
                shared_norm=len(norms) == 1,
            ),
        ),
        hidden_size=h,
        vocab_size=v,
        embedding="word_embeddings",
        buffers=rotary_buffers("rotary_emb", d),
        prompt=prompt_dims(c, len(layers), h, a),
        dropout=Dropout(
            hidden, probability(c, "attention_dropout"), classifier=probability(c, "classifier_dropout", default=hidden)
        ),
    )
    return decoder_model(backbone, c, task_type, tie_word_embeddings=True, token_cls="classifier")


def _flag(c: Fields, name: str, *, default: bool) -> bool:
    """A flag whose explicit null means false: `FalconConfig` keeps the null, and the model tests its truth."""
    return False if c.raw.get(name, default) is None else c.bool(name, default=default)


def _key_value_heads(c: Fields, a: int) -> int:
    """`num_kv_heads` with the new decoder, 1 with `multi_query`, else as many as query heads."""
    configured = c.int("num_kv_heads", default=a)
    if _flag(c, "new_decoder_architecture", default=False):
        c.divide("num_attention_heads", a, "num_kv_heads", configured)
        return configured
    if _flag(c, "multi_query", default=True):
        return 1
    if configured != a:
        raise RefusedError(
            f"{c.name}: num_kv_heads is {configured}, which needs new_decoder_architecture; accepted without it: {a}"
        )
    return a


def _norms(c: Fields) -> tuple[tuple[str, ...], bool]:
    """Names of a layer's norms in module order, and whether the layer is parallel.

    The combinations refused here can be built, but their forward pass asks for a norm that the layer does not have.
    """
    new = _flag(c, "new_decoder_architecture", default=False)
    parallel = _flag(c, "parallel_attn", default=True)
    count = c.int("num_ln_in_parallel_attn", default=2 if new else 1, high=2)
    if new and not parallel:
        raise RefusedError(f"{c.name}: new_decoder_architecture needs parallel_attn: its layers are always parallel")
    if not parallel:
        return ("post_attention_layernorm", "input_layernorm"), False
    if count == 2 and not new:
        raise RefusedError(f"{c.name}: num_ln_in_parallel_attn is 2, which needs new_decoder_architecture")
    return (("ln_attn", "ln_mlp") if count == 2 else ("input_layernorm",)), True
