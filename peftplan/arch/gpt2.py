"""Decoders of the GPT-2 shape: token and position embeddings, [norm, attention, norm, MLP] × layers, final norm, head.

Sources: transformers, `models/<model_type>/modeling_<model_type>.py` and the config class's defaults beside it.
"""

from __future__ import annotations

from dataclasses import replace

from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, decoder_model, equal_head_dim, probability, prompt_dims
from peftplan.arch.modules import Architecture, Buffer, Dropout, Module, conv1d, embedding, layernorm, linear
from peftplan.errors import RefusedError

DROPOUT = 0.1
"""Every dropout probability that a config does not state."""


def gpt2(c: Fields, task_type: str) -> Architecture:
    """GPT-2: its linear layers are transformers' `Conv1D`."""
    model = decoder_model(_backbone(c, "GPT2"), c, task_type, tie_word_embeddings=True, token_cls="classifier")
    return replace(model, model_class="GPT2LMHeadModel") if task_type == "CAUSAL_LM" else model


def gpt_bigcode(c: Fields, task_type: str) -> Architecture:
    """StarCoder 1: GPT-2 with `nn.Linear` and, with `multi_query`, one key/value head; the causal mask is a buffer."""
    backbone = _backbone(c, "GPTBigCode", multi_query=c.bool("multi_query", default=True))
    return decoder_model(backbone, c, task_type, tie_word_embeddings=True, token_cls="classifier")


def _backbone(c: Fields, stem: str, *, multi_query: bool = False) -> Backbone:
    """h n_embd, i n_inner, v vocab_size, p n_positions, a query heads, kv key/value heads, d head_dim."""
    _refuse_cross_attention(c)
    h, v, p = c.int("n_embd", "hidden_size"), c.int("vocab_size"), c.int("n_positions", "max_position_embeddings")
    a = c.int("n_head", "num_attention_heads")
    d = equal_head_dim(c, h, a)
    kv = 1 if multi_query else a
    i = c.int("n_inner", default=4 * h)
    layers = c.layers("n_layer", "num_hidden_layers")
    is_gpt2 = stem == "GPT2"
    prompt = prompt_dims(c, len(layers), h, a)

    def layer(name: str, n_in: int, n_out: int) -> Module:
        full = f"h.{{}}.{name}"
        return conv1d(full, n_in, n_out, layers) if is_gpt2 else linear(full, n_in, n_out, True, layers)

    return Backbone(
        model_type=c.str("model_type"),
        stem=stem,
        prefix="transformer",
        modules=(
            embedding("wte", v, h),
            embedding("wpe", p, h),
            layernorm("h.{}.ln_1", h, layers=layers),
            layer("attn.c_attn", h, h + 2 * kv * d),
            layer("attn.c_proj", h, h),
            layernorm("h.{}.ln_2", h, layers=layers),
            layer("mlp.c_fc", h, i),
            layer("mlp.c_proj", i, h),
            layernorm("ln_f", h),
        ),
        blocks=(
            Block(
                stack="decoder",
                layers=layers,
                attentions=(Attention(a, kv, d, positions="learned", fused_qkv=True),),
                mlp=Mlp("plain", i, c.str("activation_function", default="gelu_new" if is_gpt2 else "gelu_pytorch_tanh")),
                norm="layernorm",
            ),
        ),
        hidden_size=h,
        vocab_size=v,
        embedding="wte",
        buffers=() if is_gpt2 else (Buffer("bias", "bool", (p, p)),),
        # GPTBigCodeConfig writes num_key_value_heads itself, from multi_query.
        prompt=prompt if is_gpt2 else prompt._replace(num_key_value_heads=kv),
        dropout=Dropout(
            probability(c, "resid_pdrop", default=DROPOUT),
            probability(c, "attn_pdrop", default=DROPOUT),
            embedding=probability(c, "embd_pdrop", default=DROPOUT),
            classifier=probability(c, "classifier_dropout", "hidden_dropout", default=DROPOUT),
        ),
        max_positions=p,
    )


def _refuse_cross_attention(c: Fields) -> None:
    """Raise RefusedError for cross-attention: such a decoder is half of an `EncoderDecoderModel`; alone it never runs them."""
    if c.bool("add_cross_attention", default=False):
        raise RefusedError(f"{c.name}: add_cross_attention is true, so this is half of an encoder-decoder model; not supported")
