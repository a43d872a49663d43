"""DistilBERT: BERT's shape without segment embeddings, with its own names.

Source: transformers, `models/distilbert/{configuration,modeling}_distilbert.py`. Left out: the multiple-choice head.
"""

from __future__ import annotations

from peftplan.arch.bert import classifier
from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, attach, check_task, probability
from peftplan.arch.modules import Architecture, Buffer, Dropout, embedding, layernorm, linear
from peftplan.errors import InputError

TASKS = ("MASKED_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
DEFAULT_DROPOUT = 0.1
SEQ_CLS_DROPOUT = 0.2
DEFAULT_HIDDEN_DIM = 3072
"""The MLP's width where `hidden_dim` is absent; the config class does not read `intermediate_size`."""


def distilbert(c: Fields, task_type: str) -> Architecture:
    """DistilBERT with the head of a task; the classification head has a hidden layer, the language model a transform."""
    check_task(task_type, TASKS, model_type="distilbert")
    backbone = _backbone(c, task_type)
    h, v = backbone.hidden_size, backbone.vocab_size
    if task_type == "MASKED_LM":
        tied = c.bool("tie_word_embeddings", default=True)
        return attach(
            backbone,
            task_type,
            (
                linear("vocab_transform", h, h, True),
                layernorm("vocab_layer_norm", h),
                linear("vocab_projector", h, v, True),
            ),
            ties=(("vocab_projector.weight", f"{backbone.prefix}.{backbone.embedding}.weight"),) if tied else (),
            output_embedding="vocab_projector",
        )
    hidden = (linear("pre_classifier", h, h, True),) if task_type == "SEQ_CLS" else ()
    return attach(backbone, task_type, (*hidden, *classifier(c, task_type, h)))


def _hidden_dim(c: Fields) -> int:
    width = c.int("hidden_dim", default=DEFAULT_HIDDEN_DIM)
    if c.int("intermediate_size", default=width) != width:
        raise InputError(f"{c.name}: intermediate_size", c.int("intermediate_size"), f"hidden_dim ({width}) is what counts")
    return width


def _dropout(c: Fields, task_type: str) -> Dropout:
    hidden = probability(c, "dropout", default=DEFAULT_DROPOUT)
    classifier = {
        "SEQ_CLS": probability(c, "seq_classif_dropout", default=SEQ_CLS_DROPOUT),
        "QUESTION_ANS": probability(c, "qa_dropout", default=DEFAULT_DROPOUT),
    }.get(task_type, hidden)
    attention = probability(c, "attention_dropout", default=DEFAULT_DROPOUT)
    return Dropout(hidden, attention, embedding=hidden, classifier=classifier)


def _backbone(c: Fields, task_type: str) -> Backbone:
    """peft finds no token_dim in this config (`dim` is not a name it looks for), so `prompt` stays None."""
    h, v, p = c.int("dim", "hidden_size"), c.int("vocab_size"), c.int("max_position_embeddings")
    a, i = c.int("n_heads", "num_attention_heads"), _hidden_dim(c)
    d = c.divide("dim", h, "n_heads", a)
    layers = c.layers("n_layers", "num_hidden_layers")
    at = "transformer.layer.{}"
    return Backbone(
        model_type="distilbert",
        stem="DistilBert",
        prefix="distilbert",
        modules=(
            embedding("embeddings.word_embeddings", v, h),
            embedding("embeddings.position_embeddings", p, h),
            layernorm("embeddings.LayerNorm", h),
            *(linear(f"{at}.attention.{part}_lin", h, h, True, layers) for part in ("q", "k", "v", "out")),
            layernorm(f"{at}.sa_layer_norm", h, layers=layers),
            linear(f"{at}.ffn.lin1", h, i, True, layers),
            linear(f"{at}.ffn.lin2", i, h, True, layers),
            layernorm(f"{at}.output_layer_norm", h, layers=layers),
        ),
        blocks=(
            Block(
                stack="encoder",
                layers=layers,
                attentions=(Attention(a, a, d, positions="learned", causal=False),),
                mlp=Mlp("plain", i, c.str("activation", default="gelu")),
                norm="layernorm",
                norm_position="post",
            ),
        ),
        hidden_size=h,
        vocab_size=v,
        embedding="embeddings.word_embeddings",
        buffers=(Buffer("embeddings.position_ids", "int64", (1, p)),),
        dropout=_dropout(c, task_type),
        max_positions=p,
    )
