"""Encoders of the BERT shape: three summed embeddings, [attention, norm, MLP, norm] × layers, and a head per task.

Sources: transformers, `models/{bert,roberta,xlm_roberta}/modeling_*.py`. Letters: h hidden_size, i intermediate_size,
v vocab_size, p max_position_embeddings. Left out: the pre-training, next-sentence and multiple-choice heads.
"""

from __future__ import annotations

from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, attach, check_task, dropout_of, num_labels, prompt_dims
from peftplan.arch.modules import Architecture, Buffer, Module, embedding, layernorm, linear
from peftplan.errors import InputError

TASKS = ("MASKED_LM", "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def bert(c: Fields, task_type: str) -> Architecture:
    """BERT: pooled classification, and a language-model head under `cls.predictions`."""
    check_task(task_type, TASKS, model_type="bert")
    backbone = _backbone(
        c,
        "Bert",
        prefix="bert",
        embeddings=("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"),
        pooler=task_type in ("SEQ_CLS", "FEATURE_EXTRACTION"),
    )
    h = backbone.hidden_size
    if task_type in ("MASKED_LM", "CAUSAL_LM"):
        model_class = "BertLMHeadModel" if task_type == "CAUSAL_LM" else None
        names = ("cls.predictions", "transform.dense", "transform.LayerNorm")
        return _language_model(c, backbone, task_type, names, model_class=model_class)
    return attach(backbone, task_type, classifier(c, task_type, h))


def roberta(c: Fields, task_type: str) -> Architecture:
    """RoBERTa: position embeddings are registered last but one. The classification head has a hidden layer, and no pooler."""
    return _roberta(c, task_type, "Roberta", head_first=False)


def xlm_roberta(c: Fields, task_type: str) -> Architecture:
    """XLM-RoBERTa: RoBERTa, but its task classes register the head before the encoder."""
    return _roberta(c, task_type, "XLMRoberta", head_first=True)


def _roberta(c: Fields, task_type: str, stem: str, *, head_first: bool) -> Architecture:
    check_task(task_type, TASKS, model_type=c.str("model_type"))
    backbone = _backbone(
        c,
        stem,
        prefix="roberta",
        embeddings=("word_embeddings", "token_type_embeddings", "LayerNorm", "position_embeddings"),
        pooler=task_type == "FEATURE_EXTRACTION",
    )
    # Positions start at the row after the padding row (`create_position_ids_from_input_ids`).
    before = c.int("pad_token_id", default=1, low=0) + 1
    backbone = backbone._replace(max_positions=max(c.int("max_position_embeddings") - before, 0))
    h = backbone.hidden_size
    if task_type in ("MASKED_LM", "CAUSAL_LM"):
        return _language_model(c, backbone, task_type, ("lm_head", "dense", "layer_norm"), head_first=head_first)
    if task_type == "SEQ_CLS":
        head = (linear("classifier.dense", h, h, True), linear("classifier.out_proj", h, num_labels(c), True))
        return attach(backbone, task_type, head, head_first=head_first)
    return attach(backbone, task_type, classifier(c, task_type, h), head_first=head_first)


def classifier(c: Fields, task_type: str, width: int) -> tuple[Module, ...]:
    """One biased linear layer on top: `classifier`, or `qa_outputs` for question answering; none for the bare model."""
    if task_type == "FEATURE_EXTRACTION":
        return ()
    return (linear("qa_outputs" if task_type == "QUESTION_ANS" else "classifier", width, num_labels(c), True),)


def _language_model(
    c: Fields,
    backbone: Backbone,
    task_type: str,
    names: tuple[str, str, str],
    *,
    model_class: str | None = None,
    head_first: bool = False,
) -> Architecture:
    """A transform (h, h), a norm, and a decoder (v, h); `names` are the head, and transform and norm inside it.

    The head owns a bias (v) besides the decoder's own: they are one tensor where embeddings are tied, two where not.
    """
    h, v = backbone.hidden_size, backbone.vocab_size
    head, transform, norm = names
    shared = (f"{head}.decoder.weight", f"{backbone.prefix}.{backbone.embedding}.weight")
    ties = ((shared[1], shared[0]) if head_first else shared, (f"{head}.decoder.bias", f"{head}.bias"))
    return attach(
        backbone,
        task_type,
        (
            Module(head, "Module", (("bias", (v,)),)),
            linear(f"{head}.{transform}", h, h, True),
            layernorm(f"{head}.{norm}", h),
            linear(f"{head}.decoder", h, v, True),
        ),
        ties=ties if c.bool("tie_word_embeddings", default=True) else (),
        output_embedding=f"{head}.decoder",
        model_class=model_class,
        head_first=head_first,
    )


def _backbone(c: Fields, stem: str, *, prefix: str, embeddings: tuple[str, ...], pooler: bool) -> Backbone:
    """The bare encoder; with `is_decoder` its attention is causal, and `add_cross_attention` adds one to each layer."""
    h, v, p = c.int("hidden_size"), c.int("vocab_size"), c.int("max_position_embeddings")
    a = c.int("num_attention_heads")
    c.divide("hidden_size", h, "num_attention_heads", a)
    layers = c.layers("num_hidden_layers")
    rows = {"word_embeddings": v, "position_embeddings": p, "token_type_embeddings": c.int("type_vocab_size")}
    return Backbone(
        model_type=c.str("model_type"),
        stem=stem,
        prefix=prefix,
        modules=(
            *(
                embedding(f"embeddings.{name}", rows[name], h) if name in rows else layernorm(f"embeddings.{name}", h)
                for name in embeddings
            ),
            *_layer(c, h, layers),
            *((linear("pooler.dense", h, h, True),) if pooler else ()),
        ),
        blocks=(_block(c, h // a, layers),),
        hidden_size=h,
        vocab_size=v,
        embedding="embeddings.word_embeddings",
        buffers=tuple(Buffer(f"embeddings.{name}", "int64", (1, p)) for name in ("position_ids", "token_type_ids")),
        prompt=prompt_dims(c, len(layers), h, a),
        dropout=dropout_of(c),
        max_positions=p,
    )


def _layer(c: Fields, h: int, layers: tuple[int, ...]) -> tuple[Module, ...]:
    """Self-attention, cross-attention where configured, and the MLP; a norm follows each."""
    i = c.int("intermediate_size")

    def attention(name: str) -> tuple[Module, ...]:
        at = f"encoder.layer.{{}}.{name}"
        return (
            *(linear(f"{at}.self.{part}", h, h, True, layers) for part in ("query", "key", "value")),
            linear(f"{at}.output.dense", h, h, True, layers),
            layernorm(f"{at}.output.LayerNorm", h, layers=layers),
        )

    return (
        *attention("attention"),
        *(attention("crossattention") if _has_cross_attention(c) else ()),
        linear("encoder.layer.{}.intermediate.dense", h, i, True, layers),
        linear("encoder.layer.{}.output.dense", i, h, True, layers),
        layernorm("encoder.layer.{}.output.LayerNorm", h, layers=layers),
    )


def _block(c: Fields, head_dim: int, layers: tuple[int, ...]) -> Block:
    a, causal = c.int("num_attention_heads"), c.bool("is_decoder", default=False)
    self_attention = Attention(a, a, head_dim, positions="learned", causal=causal)
    cross_attention = Attention(a, a, head_dim, positions="none", causal=False, cross=True)
    return Block(
        stack="decoder" if causal else "encoder",
        layers=layers,
        attentions=(self_attention, cross_attention) if _has_cross_attention(c) else (self_attention,),
        mlp=Mlp("plain", c.int("intermediate_size"), c.str("hidden_act", default="gelu")),
        norm="layernorm",
        norm_position="post",
    )


def _has_cross_attention(c: Fields) -> bool:
    cross = c.bool("add_cross_attention", default=False)
    if cross and not c.bool("is_decoder", default=False):
        raise InputError(f"{c.name}: add_cross_attention", True, "accepted: true only together with is_decoder")
    return cross
