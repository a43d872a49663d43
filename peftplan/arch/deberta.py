"""DeBERTa v2 and v3: disentangled attention. All layers of the encoder share one embedding of relative positions.

Source: transformers, `models/deberta_v2/{configuration,modeling}_deberta_v2.py`. Letters: h hidden_size, e embedding_size
(h unless stated), a heads, d attention_head_size. Left out: the multiple-choice head.
"""

from __future__ import annotations

from peftplan.arch.bert import classifier
from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import BERT_DROPOUT, Backbone, attach, check_task, probability, prompt_dims
from peftplan.arch.modules import Architecture, Buffer, Dropout, Module, embedding, layernorm, linear

TASKS = ("MASKED_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

POSITION_PROJECTIONS = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
"""The kind of score → its own projection of positions, unless positions share that of the content."""


def deberta_v2(c: Fields, task_type: str) -> Architecture:
    """DeBERTa v2 with the head of a task; sequence classification puts a `pooler` between model and classifier."""
    check_task(task_type, TASKS, model_type="deberta-v2")
    backbone = _backbone(c)
    h = backbone.hidden_size
    if task_type == "MASKED_LM":
        return _legacy_head(c, backbone) if c.bool("legacy", default=True) else _new_head(backbone)
    width = c.int("pooler_hidden_size", default=h)
    pooler = (linear("pooler.dense", width, width, True),) if task_type == "SEQ_CLS" else ()
    return attach(backbone, task_type, (*pooler, *classifier(c, task_type, h)))


def _legacy_head(c: Fields, backbone: Backbone) -> Architecture:
    """BERT's head with a transform (e, h); its two biases are one tensor where embeddings are tied."""
    h, v, e, head = backbone.hidden_size, backbone.vocab_size, _embedding_size(c), "cls.predictions"
    tied = c.bool("tie_word_embeddings", default=True)
    ties = (
        (f"{head}.decoder.bias", f"{head}.bias"),
        (f"{head}.decoder.weight", f"{backbone.prefix}.{backbone.embedding}.weight"),
    )
    return attach(
        backbone,
        "MASKED_LM",
        (
            Module(head, "Module", (("bias", (v,)),)),
            linear(f"{head}.transform.dense", h, e, True),
            layernorm(f"{head}.transform.LayerNorm", e),
            linear(f"{head}.decoder", e, v, True),
        ),
        ties=ties if tied else (),
        output_embedding=f"{head}.decoder",
    )


def _new_head(backbone: Backbone) -> Architecture:
    """A head without a decoder: it multiplies by the token embedding. `get_output_embeddings()` returns its transform."""
    h, v, head = backbone.hidden_size, backbone.vocab_size, "lm_predictions.lm_head"
    return attach(
        backbone,
        "MASKED_LM",
        (
            Module(head, "Module", (("bias", (v,)),)),
            linear(f"{head}.dense", h, h, True),
            layernorm(f"{head}.LayerNorm", h),
        ),
        output_embedding=f"{head}.dense",
    )


def _embedding_size(c: Fields) -> int:
    return c.int("embedding_size", default=c.int("hidden_size"))


def _backbone(c: Fields) -> Backbone:
    h, a = c.int("hidden_size"), c.int("num_attention_heads")
    layers = c.layers("num_hidden_layers")
    return Backbone(
        model_type="deberta-v2",
        stem="DebertaV2",
        prefix="deberta",
        modules=(*_embeddings(c, h), *_layer(c, h, layers), *_shared(c, h)),
        blocks=(
            Block(
                stack="encoder",
                layers=layers,
                attentions=(
                    Attention(
                        a,
                        a,
                        _head_dim(c),
                        positions="disentangled" if c.bool("relative_attention", default=False) else "learned",
                        causal=False,
                        relative=_position_kinds(c),
                        bucketed=_buckets(c) > 0,
                    ),
                ),
                mlp=Mlp("plain", c.int("intermediate_size"), c.str("hidden_act", default="gelu")),
                norm="layernorm",
                norm_position="post",
                convolution=c.str("conv_act", default="tanh"),
            ),
        ),
        hidden_size=h,
        vocab_size=c.int("vocab_size"),
        embedding="embeddings.word_embeddings",
        buffers=(Buffer("embeddings.position_ids", "int64", (1, c.int("max_position_embeddings"))),),
        prompt=prompt_dims(c, len(layers), h, a),
        supports_sdpa=False,
        supports_flash_attn=False,
        dropout=_dropout(c),
        max_positions=c.int("max_position_embeddings") if c.bool("position_biased_input", default=True) else None,
    )


def _dropout(c: Fields) -> Dropout:
    """`cls_dropout` of the classifier; the pooler's own is `pooler_dropout`, of the sequence's first token."""
    hidden = probability(c, "hidden_dropout_prob", default=BERT_DROPOUT)
    attention = probability(c, "attention_probs_dropout_prob", default=BERT_DROPOUT)
    return Dropout(hidden, attention, embedding=hidden, classifier=probability(c, "cls_dropout", default=hidden))


def _head_dim(c: Fields) -> int:
    even = c.divide("hidden_size", c.int("hidden_size"), "num_attention_heads", c.int("num_attention_heads"))
    return c.int("attention_head_size", default=even)


def _embeddings(c: Fields, h: int) -> tuple[Module, ...]:
    """Token embeddings, those of positions and segments if configured, and a projection if e is not h."""
    e, types = _embedding_size(c), c.int("type_vocab_size", default=0, low=0)
    positions = c.bool("position_biased_input", default=True)
    return (
        embedding("embeddings.word_embeddings", c.int("vocab_size"), e),
        *((embedding("embeddings.position_embeddings", c.int("max_position_embeddings"), e),) if positions else ()),
        *((embedding("embeddings.token_type_embeddings", types, e),) if types else ()),
        *((linear("embeddings.embed_proj", e, h),) if e != h else ()),
        layernorm("embeddings.LayerNorm", h),
    )


def _layer(c: Fields, h: int, layers: tuple[int, ...]) -> tuple[Module, ...]:
    """Attention (with its own position projections where it does not share the content's), norm, MLP, norm."""
    i, inner, at = c.int("intermediate_size"), c.int("num_attention_heads") * _head_dim(c), "encoder.layer.{}"
    projections = ("query_proj", "key_proj", "value_proj", *_position_projections(c))
    return (
        *(linear(f"{at}.attention.self.{name}", h, inner, True, layers) for name in projections),
        linear(f"{at}.attention.output.dense", h, h, True, layers),
        layernorm(f"{at}.attention.output.LayerNorm", h, layers=layers),
        linear(f"{at}.intermediate.dense", h, i, True, layers),
        linear(f"{at}.output.dense", i, h, True, layers),
        layernorm(f"{at}.output.LayerNorm", h, layers=layers),
    )


def _position_kinds(c: Fields) -> tuple[str, ...]:
    """The kinds of scores in use: content to position (`c2p`), position to content (`p2c`)."""
    if not c.bool("relative_attention", default=False):
        return ()
    pos_att_type = c.raw.get("pos_att_type")
    kinds = (
        [k.strip() for k in pos_att_type.lower().split("|")]
        if isinstance(pos_att_type, str)
        else c.strs("pos_att_type", default=())
    )
    return tuple(kind for kind in POSITION_PROJECTIONS if kind in kinds)


def _buckets(c: Fields) -> int:
    return c.int("position_buckets", default=-1, low=-1)


def _position_projections(c: Fields) -> tuple[str, ...]:
    if c.bool("share_att_key", default=False):
        return ()
    return tuple(POSITION_PROJECTIONS[kind] for kind in _position_kinds(c))


def _shared(c: Fields, h: int) -> tuple[Module, ...]:
    """The encoder's modules outside its layers: relative positions, their norm, and v2's convolution after layer 0."""
    modules: list[Module] = []
    if c.bool("relative_attention", default=False):
        reach = c.int("max_relative_positions", default=-1, low=-1)
        buckets = _buckets(c)
        half = buckets if buckets > 0 else reach if reach > 0 else c.int("max_position_embeddings")
        modules.append(embedding("encoder.rel_embeddings", 2 * half, h))
    if "layer_norm" in [part.strip() for part in c.str("norm_rel_ebd", default="none").lower().split("|")]:
        modules.append(layernorm("encoder.LayerNorm", h))
    kernel = c.int("conv_kernel_size", default=0, low=0)
    if kernel:
        groups = c.divide("hidden_size", h, "conv_groups", c.int("conv_groups", default=1))
        modules.append(Module("encoder.conv.conv", "Conv1d", (("weight", (h, groups, kernel)), ("bias", (h,)))))
        modules.append(layernorm("encoder.conv.LayerNorm", h))
    return tuple(modules)
