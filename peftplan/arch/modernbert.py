"""ModernBERT: a pre-norm encoder with rotary positions, fused projections, and a window in two of three layers.

Source: transformers, `models/modernbert/{configuration,modeling}_modernbert.py`. Left out: the multiple-choice head.
"""

from __future__ import annotations

from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, attach, check_task, equal_head_dim, num_labels, probability, prompt_dims
from peftplan.arch.modules import Architecture, Buffer, Dropout, Module, embedding, layernorm, linear
from peftplan.errors import InputError

TASKS = ("MASKED_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
LAYER_TYPES = ("full_attention", "sliding_attention")


def modernbert(c: Fields, task_type: str) -> Architecture:
    """ModernBERT; every task has the same `head` (dense and norm) before its last linear layer."""
    check_task(task_type, TASKS, model_type="modernbert")
    backbone = _backbone(c)
    h, v = backbone.hidden_size, backbone.vocab_size
    if task_type == "FEATURE_EXTRACTION":
        return attach(backbone, task_type, ())
    head = (
        linear("head.dense", h, h, c.bool("classifier_bias", default=False)),
        layernorm("head.norm", h, bias=c.bool("norm_bias", default=False)),
    )
    if task_type != "MASKED_LM":
        return attach(backbone, task_type, (*head, linear("classifier", h, num_labels(c), True)))
    tied = c.bool("tie_word_embeddings", default=True)
    return attach(
        backbone,
        task_type,
        (*head, linear("decoder", h, v, c.bool("decoder_bias", default=True))),
        ties=(("decoder.weight", f"{backbone.prefix}.{backbone.embedding}.weight"),) if tied else (),
        output_embedding="decoder",
    )


def _layer_types(c: Fields, num_layers: int) -> tuple[str, ...]:
    """Stated, or full attention in every `global_attn_every_n_layers`-th layer, as configs from before transformers 5 say."""
    every = c.int("global_attn_every_n_layers", default=3)
    types = c.strs("layer_types", default=[LAYER_TYPES[bool(n % every)] for n in range(num_layers)])
    if len(types) != num_layers or not set(types) <= set(LAYER_TYPES):
        raise InputError(f"{c.name}: layer_types", types, f"accepted: {num_layers} of {', '.join(LAYER_TYPES)}")
    return types


def _backbone(c: Fields) -> Backbone:
    h, a = c.int("hidden_size"), c.int("num_attention_heads")
    d = equal_head_dim(c, h, a)
    layers = c.layers("num_hidden_layers")
    types = _layer_types(c, len(layers))
    return Backbone(
        model_type="modernbert",
        stem="ModernBert",
        prefix="model",
        modules=(
            embedding("embeddings.tok_embeddings", c.int("vocab_size"), h),
            layernorm("embeddings.norm", h, bias=c.bool("norm_bias", default=False)),
            *_layer(c, h, layers),
            layernorm("final_norm", h, bias=c.bool("norm_bias", default=False)),
        ),
        blocks=tuple(_block(c, d, kind, tuple(n for n in layers if types[n] == kind)) for kind in LAYER_TYPES if kind in types),
        hidden_size=h,
        vocab_size=c.int("vocab_size"),
        embedding="embeddings.tok_embeddings",
        buffers=tuple(
            Buffer(f"rotary_emb.{kind}_{part}", "fp32", ((d + 1) // 2,))
            for kind in sorted(set(types))
            for part in ("inv_freq", "original_inv_freq")
        ),
        prompt=prompt_dims(c, len(layers), h, a),
        dropout=Dropout(
            probability(c, "mlp_dropout"),
            probability(c, "attention_dropout"),
            embedding=probability(c, "embedding_dropout"),
            classifier=probability(c, "classifier_dropout"),
        ),
    )


def _layer(c: Fields, h: int, layers: tuple[int, ...]) -> tuple[Module, ...]:
    """The modules of a layer. Layer 0 has no `attn_norm`, since the embedding's norm precedes it."""
    i = c.int("intermediate_size")
    norm_bias, bias, mlp_bias = (c.bool(name, default=False) for name in ("norm_bias", "attention_bias", "mlp_bias"))
    return (
        linear("layers.{}.attn.Wqkv", h, 3 * h, bias, layers),
        linear("layers.{}.attn.Wo", h, h, bias, layers),
        layernorm("layers.{}.mlp_norm", h, norm_bias, layers),
        linear("layers.{}.mlp.Wi", h, 2 * i, mlp_bias, layers),
        linear("layers.{}.mlp.Wo", i, h, mlp_bias, layers),
        *((layernorm("layers.{}.attn_norm", h, norm_bias, layers[1:]),) if len(layers) > 1 else ()),
    )


def _block(c: Fields, head_dim: int, kind: str, layers: tuple[int, ...]) -> Block:
    """A window sees `local_attention // 2` tokens to each side and the token itself."""
    a = c.int("num_attention_heads")
    window = 2 * (c.int("local_attention", default=128) // 2) + 1 if kind == "sliding_attention" else None
    return Block(
        stack="encoder",
        layers=layers,
        attentions=(Attention(a, a, head_dim, window=window, fused_qkv=True, causal=False),),
        mlp=Mlp("gated", c.int("intermediate_size"), c.str("hidden_activation", default="gelu"), fused_gate_up=True),
        norm="layernorm",
    )
