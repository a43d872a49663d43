"""Decoders with attention and MLP in parallel: GPT-J, Phi 1 … 2, GPT-NeoX (Pythia).

Sources: transformers, `models/<model_type>/modeling_<model_type>.py` and the config class's defaults beside it.
"""

from __future__ import annotations

from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import (
    Backbone,
    classifier_dropout,
    decoder_model,
    equal_head_dim,
    partial_rotary_dim,
    probability,
    prompt_dims,
    rotary_buffers,
)
from peftplan.arch.modules import Architecture, Buffer, Dropout, Module, PromptDims, embedding, layernorm, linear
from peftplan.errors import RefusedError

NEOX_CLASSIFIER_DROPOUT = 0.1


def gptj(c: Fields, task_type: str) -> Architecture:
    """GPT-J: one norm for both halves, no biases in attention, a bias in `lm_head`, a table of rotations as buffer.

    h n_embd, i n_inner, v vocab_size, a heads, d head_dim.
    """
    h, v, a = c.int("n_embd", "hidden_size"), c.int("vocab_size"), c.int("n_head", "num_attention_heads")
    d = equal_head_dim(c, h, a)
    i = c.int("n_inner", default=4 * h)
    layers = c.layers("n_layer", "num_hidden_layers")
    rotary_dim = c.int("rotary_dim", default=64, high=d)
    # A sine and a cosine for every second dimension, 0, 2, 4 …: rotary_dim columns, one more where it is odd.
    rotations = (c.int("n_positions", "max_position_embeddings"), 2 * ((rotary_dim + 1) // 2))
    backbone = Backbone(
        model_type=c.str("model_type"),
        stem="GPTJ",
        prefix="transformer",
        modules=(
            embedding("wte", v, h),
            layernorm("h.{}.ln_1", h, layers=layers),
            *(linear(f"h.{{}}.attn.{n}", h, h, layers=layers) for n in ("k_proj", "v_proj", "q_proj", "out_proj")),
            linear("h.{}.mlp.fc_in", h, i, True, layers),
            linear("h.{}.mlp.fc_out", i, h, True, layers),
            layernorm("ln_f", h),
        ),
        blocks=(
            _block(
                layers,
                Attention(a, a, d, rotary_dim=rotary_dim),
                Mlp("plain", i, c.str("activation_function", default="gelu_new")),
            ),
        ),
        hidden_size=h,
        vocab_size=v,
        embedding="wte",
        buffers=(Buffer("rotary_emb.embed_positions", "fp32", rotations),),
        prompt=prompt_dims(c, len(layers), h, a),
        dropout=_dropout(c, attention="attn_pdrop"),
        max_positions=rotations[0],
    )
    return decoder_model(backbone, c, task_type, tasks=("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"), head_bias=True)


def phi(c: Fields, task_type: str) -> Architecture:
    """Phi 1, 1.5, 2: one norm for both halves, biases everywhere, `lm_head` included; part of each head rotates.

    h hidden_size, i intermediate_size, v vocab_size, a query heads, kv key/value heads, d head_dim.
    """
    h, i, v, a = c.int("hidden_size"), c.int("intermediate_size"), c.int("vocab_size"), c.int("num_attention_heads")
    kv = c.int("num_key_value_heads", default=a)
    d = c.optional_int("head_dim") or c.divide("hidden_size", h, "num_attention_heads", a)
    layers = c.layers("num_hidden_layers")
    qk_norm = c.bool("qk_layernorm", default=False)
    if qk_norm and d != h // a:
        raise RefusedError(f"{c.name}: qk_layernorm norms hidden_size / num_attention_heads = {h // a} numbers, head_dim is {d}")

    def layer(name: str, n_in: int, n_out: int) -> Module:
        return linear(f"layers.{{}}.{name}", n_in, n_out, True, layers)

    rotary_dim = partial_rotary_dim(c, d, default=0.5)
    attention = Attention(a, kv, d, qk_norm=qk_norm, rotary_dim=rotary_dim)
    norms = (layernorm(f"layers.{{}}.self_attn.{n}", d, layers=layers) for n in ("q_layernorm", "k_layernorm") if qk_norm)
    backbone = Backbone(
        model_type=c.str("model_type"),
        stem="Phi",
        prefix="model",
        modules=(
            embedding("embed_tokens", v, h),
            layer("self_attn.q_proj", h, a * d),
            layer("self_attn.k_proj", h, kv * d),
            layer("self_attn.v_proj", h, kv * d),
            layer("self_attn.dense", a * d, h),
            *norms,
            layer("mlp.fc1", h, i),
            layer("mlp.fc2", i, h),
            layernorm("layers.{}.input_layernorm", h, layers=layers),
            layernorm("final_layernorm", h),
        ),
        blocks=(_block(layers, attention, Mlp("plain", i, c.str("hidden_act", default="gelu_new"))),),
        hidden_size=h,
        vocab_size=v,
        embedding="embed_tokens",
        buffers=rotary_buffers("rotary_emb", rotary_dim),
        prompt=PromptDims(len(layers), h, a, num_key_value_heads=kv, head_dim=c.optional_int("head_dim")),
        dropout=_dropout(c, attention="attention_dropout"),
    )
    return decoder_model(backbone, c, task_type, head_bias=True)


def gpt_neox(c: Fields, task_type: str) -> Architecture:
    """GPT-NeoX and Pythia: two norms, a fused query_key_value, a part (`rotary_pct`) of each head rotates.

    h hidden_size, i intermediate_size, v vocab_size, a heads, d head_dim.
    """
    h, i, v, a = c.int("hidden_size"), c.int("intermediate_size"), c.int("vocab_size"), c.int("num_attention_heads")
    d = equal_head_dim(c, h, a)
    layers = c.layers("num_hidden_layers")
    bias = c.bool("attention_bias", default=True)
    rotary_dim = partial_rotary_dim(c, d, default=0.25, legacy="rotary_pct")
    attention = Attention(a, a, d, fused_qkv=True, rotary_dim=rotary_dim)
    mlp = Mlp("plain", i, c.str("hidden_act", default="gelu"))
    parallel = c.bool("use_parallel_residual", default=True)
    hidden = probability(c, "hidden_dropout")
    classifier = probability(c, "classifier_dropout", default=NEOX_CLASSIFIER_DROPOUT)
    backbone = Backbone(
        model_type=c.str("model_type"),
        stem="GPTNeoX",
        prefix="gpt_neox",
        modules=(
            embedding("embed_in", v, h),
            layernorm("layers.{}.input_layernorm", h, layers=layers),
            layernorm("layers.{}.post_attention_layernorm", h, layers=layers),
            linear("layers.{}.attention.query_key_value", h, 3 * h, bias, layers),
            linear("layers.{}.attention.dense", h, h, bias, layers),
            linear("layers.{}.mlp.dense_h_to_4h", h, i, True, layers),
            linear("layers.{}.mlp.dense_4h_to_h", i, h, True, layers),
            layernorm("final_layer_norm", h),
        ),
        blocks=(Block("decoder", layers, (attention,), mlp, "layernorm", parallel=parallel),),
        hidden_size=h,
        vocab_size=v,
        embedding="embed_in",
        buffers=rotary_buffers("rotary_emb", rotary_dim),
        prompt=prompt_dims(c, len(layers), h, a),
        dropout=Dropout(hidden, probability(c, "attention_dropout"), embedding=hidden, classifier=classifier),
    )
    return decoder_model(backbone, c, task_type, token_cls="classifier")


def _block(layers: tuple[int, ...], attention: Attention, mlp: Mlp) -> Block:
    """Attention and MLP in parallel after one norm."""
    return Block("decoder", layers, (attention,), mlp, "layernorm", parallel=True, shared_norm=True)


def _dropout(c: Fields, *, attention: str) -> Dropout:
    return Dropout(
        probability(c, "resid_pdrop"),
        probability(c, attention),
        embedding=probability(c, "embd_pdrop"),
        classifier=classifier_dropout(c),
    )
