"""Decoders of the Llama shape: token embedding, [norm, attention, norm, gated MLP] × layers, final norm, head.

Sources: transformers 5.24, `models/<model_type>/modeling_<model_type>.py` and the config class's defaults beside it.
"""

from __future__ import annotations

from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, decoder_model, rotary_buffers
from peftplan.arch.modules import (
    Architecture,
    Attention,
    Block,
    Mlp,
    Module,
    PromptDims,
    embedding,
    linear,
    rmsnorm,
)


def llama(c: Fields, task_type: str) -> Architecture:
    """Llama 1 … 3: `attention_bias` on q, k, v and o; `mlp_bias` on all three of the MLP."""
    bias = c.bool("attention_bias", default=False)
    return decoder_model(_backbone(c, "Llama", qkv_bias=bias, o_bias=bias), c, task_type)


def mistral(c: Fields, task_type: str) -> Architecture:
    """Mistral: Llama with a sliding window and no biases."""
    return decoder_model(_backbone(c, "Mistral", window=c.optional_int("sliding_window")), c, task_type)


def qwen2(c: Fields, task_type: str) -> Architecture:
    """Qwen1.5 … 2.5: biases on q, k and v."""
    return decoder_model(_backbone(c, "Qwen2", qkv_bias=True), c, task_type)


def qwen3(c: Fields, task_type: str) -> Architecture:
    """Qwen3: an RMSNorm on each head of q and k."""
    bias = c.bool("attention_bias", default=False)
    return decoder_model(
        _backbone(c, "Qwen3", qkv_bias=bias, o_bias=bias, qk_norm=True, head_dim=c.int("head_dim", default=128)), c, task_type
    )


def _backbone(
    c: Fields,
    stem: str,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
    window: int | None = None,
    head_dim: int | None = None,
) -> Backbone:
    """h hidden_size, i intermediate_size, a query heads, kv key/value heads, d head_dim; weights are (out, in)."""
    h, i, v = c.int("hidden_size"), c.int("intermediate_size"), c.int("vocab_size")
    a = c.int("num_attention_heads")
    kv = c.int("num_key_value_heads", default=a)
    d = head_dim or c.optional_int("head_dim") or c.divide("hidden_size", h, "num_attention_heads", a)
    layers = c.layers("num_hidden_layers")
    mlp_bias = c.bool("mlp_bias", default=False) if stem == "Llama" else False

    def layer(name: str, n_in: int, n_out: int, bias: bool) -> Module:
        return linear(f"layers.{{}}.{name}", n_in, n_out, bias, layers)

    norms = tuple(rmsnorm(f"layers.{{}}.self_attn.{n}", d, layers) for n in ("q_norm", "k_norm")) if qk_norm else ()
    return Backbone(
        model_type=c.str("model_type"),
        stem=stem,
        prefix="model",
        modules=(
            embedding("embed_tokens", v, h),
            layer("self_attn.q_proj", h, a * d, qkv_bias),
            layer("self_attn.k_proj", h, kv * d, qkv_bias),
            layer("self_attn.v_proj", h, kv * d, qkv_bias),
            layer("self_attn.o_proj", a * d, h, o_bias),
            *norms,
            layer("mlp.gate_proj", h, i, mlp_bias),
            layer("mlp.up_proj", h, i, mlp_bias),
            layer("mlp.down_proj", i, h, mlp_bias),
            rmsnorm("layers.{}.input_layernorm", h, layers),
            rmsnorm("layers.{}.post_attention_layernorm", h, layers),
            rmsnorm("norm", h),
        ),
        blocks=(
            Block(
                stack="decoder",
                layers=layers,
                attentions=(Attention(a, kv, d, qk_norm=qk_norm, window=window),),
                mlp=Mlp("gated", i, c.str("hidden_act", default="silu")),
                norm="rmsnorm",
            ),
        ),
        hidden_size=h,
        vocab_size=v,
        embedding="embed_tokens",
        buffers=rotary_buffers("rotary_emb", d),
        prompt=PromptDims(len(layers), h, a, num_key_value_heads=kv, head_dim=c.optional_int("head_dim") or head_dim),
    )
