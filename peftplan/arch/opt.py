"""OPT: separate q, k, v with biases, learned positions, norms before or after, and in some models a narrower token embedding.

Source: transformers, `models/opt/modeling_opt.py` and `configuration_opt.py`.
"""

from __future__ import annotations

from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, attach, check_task, equal_head_dim, num_labels, probability, prompt_dims
from peftplan.arch.modules import Architecture, Dropout, Module, embedding, layernorm, linear

POSITION_OFFSET = 2
"""`OPTLearnedPositionalEmbedding` keeps two rows more than there are positions."""
DROPOUT = 0.1
"""`dropout` where the config does not state it; attention has its own, 0 by default."""


def opt(c: Fields, task_type: str) -> Architecture:
    """OPT 125M … 66B. Task heads are as wide as the token embedding, `word_embed_proj_dim` (e), which `lm_head` is tied to."""
    check_task(task_type, ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"), model_type=c.str("model_type"))
    backbone = _backbone(c)
    e = c.int("word_embed_proj_dim", default=backbone.hidden_size)
    if task_type == "CAUSAL_LM":
        tied = c.bool("tie_word_embeddings", default=True)
        ties = (("lm_head.weight", f"{backbone.prefix}.{backbone.embedding}.weight"),) if tied else ()
        head = linear("lm_head", e, backbone.vocab_size)
        return attach(backbone, task_type, (head,), ties=ties, output_embedding="lm_head")
    return attach(backbone, task_type, (linear("score", e, num_labels(c)),) if task_type == "SEQ_CLS" else ())


def _backbone(c: Fields) -> Backbone:
    """h hidden_size, e word_embed_proj_dim, i ffn_dim, v vocab_size, p positions, a heads, d head_dim."""
    h, i, v = c.int("hidden_size"), c.int("ffn_dim"), c.int("vocab_size")
    p = c.int("max_position_embeddings")
    e = c.int("word_embed_proj_dim", default=h)
    a = c.int("num_attention_heads")
    d = equal_head_dim(c, h, a)
    layers = c.layers("num_hidden_layers")
    bias = c.bool("enable_bias", default=True)
    pre_norm = c.bool("do_layer_norm_before", default=True)
    final_norm = pre_norm and not c.bool("_remove_final_layer_norm", default=False)

    def norm(name: str, layers: tuple[int, ...] | None = None) -> tuple[Module, ...]:
        affine = c.bool("layer_norm_elementwise_affine", default=True)
        return (layernorm(f"decoder.{name}", h, layers=layers),) if affine else ()

    def layer(name: str, n_in: int, n_out: int) -> Module:
        return linear(f"decoder.layers.{{}}.{name}", n_in, n_out, bias, layers)

    projections = (linear("decoder.project_out", h, e), linear("decoder.project_in", e, h))
    return Backbone(
        model_type=c.str("model_type"),
        stem="OPT",
        prefix="model",
        modules=(
            embedding("decoder.embed_tokens", v, e),
            embedding("decoder.embed_positions", p + POSITION_OFFSET, h),
            *(projections if e != h else ()),
            *(norm("final_layer_norm") if final_norm else ()),
            *(layer(f"self_attn.{n}", h, h) for n in ("k_proj", "v_proj", "q_proj", "out_proj")),
            *norm("layers.{}.self_attn_layer_norm", layers),
            layer("fc1", h, i),
            layer("fc2", i, h),
            *norm("layers.{}.final_layer_norm", layers),
        ),
        blocks=(
            Block(
                stack="decoder",
                layers=layers,
                attentions=(Attention(a, a, d, positions="learned"),),
                mlp=Mlp("plain", i, c.str("activation_function", default="relu")),
                norm="layernorm",
                norm_position="pre" if pre_norm else "post",
            ),
        ),
        hidden_size=h,
        vocab_size=v,
        embedding="decoder.embed_tokens",
        prompt=prompt_dims(c, len(layers), h, a),
        dropout=Dropout(probability(c, "dropout", default=DROPOUT), probability(c, "attention_dropout")),
        max_positions=p,
    )
