"""T5 and mT5: encoder and decoder of pre-norm blocks with a relative position bias, which only block 0 owns.

Source: transformers, `models/{t5,mt5}/{configuration,modeling}_*.py`. Letters: h d_model, a num_heads, d d_kv, i d_ff. The
`layer.0/1/2` inside a block are its self-attention, cross-attention and MLP, not layer indices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from peftplan.arch.bert import classifier
from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, attach, check_task, num_labels, probability
from peftplan.arch.modules import Architecture, Dropout, Module, PromptDims, embedding, linear, rmsnorm
from peftplan.errors import InputError

TASKS = ("SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
STEMS = {"t5": "T5", "mt5": "MT5"}
FEED_FORWARD = {"t5": "relu", "mt5": "gated-gelu"}
"""`feed_forward_proj` where the config does not state it."""
DROPOUT_RATE = 0.1
UNTIED_NOTE = "lm_head is counted apart from the embedding, as its checkpoint stores it and from_pretrained loads it"

Stack = Literal["encoder", "decoder"]


def t5(c: Fields, task_type: str) -> Architecture:
    """T5 (and 1.1, Flan) and mT5 with the head of a task; token classification and `T5EncoderModel` have no decoder."""
    model_type = c.str("model_type")
    check_task(task_type, TASKS, model_type=model_type)
    encoder_only = task_type == "TOKEN_CLS" or (task_type == "FEATURE_EXTRACTION" and _states_encoder_model(c))
    backbone = _backbone(c, ("encoder",) if encoder_only else ("encoder", "decoder"))
    h = backbone.hidden_size
    if task_type == "SEQ_2_SEQ_LM":
        return _generator(c, backbone)
    if task_type == "SEQ_CLS":
        names = ("dense", "out_proj")
        widths = (h, num_labels(c))
        head = tuple(linear(f"classification_head.{n}", h, w, True) for n, w in zip(names, widths, strict=True))
        return attach(backbone._replace(prefix="transformer"), task_type, head)
    if task_type == "TOKEN_CLS":
        return attach(backbone._replace(prefix="transformer"), task_type, classifier(c, task_type, h))
    model_class = f"{backbone.stem}EncoderModel" if encoder_only else None
    return attach(backbone, task_type, classifier(c, task_type, h), model_class=model_class)


def _generator(c: Fields, backbone: Backbone) -> Architecture:
    """`lm_head`, tied unless the config states `tie_word_embeddings: false`, or T5's `scale_decoder_outputs: false`.

    The config class of transformers forces ties on, and keeps the former as the latter; so a model made from the config
    alone has no `lm_head` of its own. But `from_pretrained` leaves it untied where the checkpoint's lm_head differs from its
    embedding (`tie_weights`, modeling_utils.py), as every checkpoint that states false ships it: T5 1.1, Flan-T5, mT5, T0.
    This is the loaded model. Left out: an mT5 saved anew by transformers 5, whose config states true whatever its lm_head.
    """
    tied = c.bool("tie_word_embeddings", default=True) and c.bool("scale_decoder_outputs", default=True)
    model = attach(
        backbone._replace(prompt=_prompt(c, submodules=2)),
        "SEQ_2_SEQ_LM",
        (linear("lm_head", backbone.hidden_size, backbone.vocab_size),),
        ties=(("lm_head.weight", "shared.weight"),) if tied else (),
        output_embedding="lm_head",
    )
    return model if tied else replace(model, notes=(UNTIED_NOTE,))


def _states_encoder_model(c: Fields) -> bool:
    return f"{STEMS[c.str('model_type')]}EncoderModel" in c.strs("architectures", default=())


def _prompt(c: Fields, *, submodules: int = 1) -> PromptDims:
    h, a = c.int("d_model", "hidden_size"), c.int("num_heads", "num_attention_heads")
    return PromptDims(len(_layers(c, "encoder")), h, a, num_transformer_submodules=submodules)


def _layers(c: Fields, stack: Stack) -> tuple[int, ...]:
    encoder = c.layers("num_layers", "num_hidden_layers")
    return encoder if stack == "encoder" else c.layers("num_decoder_layers", default=len(encoder))


def _backbone(c: Fields, stacks: tuple[Stack, ...]) -> Backbone:
    """`shared` and the stacks, whose `embed_tokens` are the same module. No prefix: only classification wraps this model."""
    h, v = c.int("d_model", "hidden_size"), c.int("vocab_size")
    model_type, rate = c.str("model_type"), probability(c, "dropout_rate", default=DROPOUT_RATE)
    modules: list[Module] = [embedding("shared", v, h)]
    for stack in stacks:
        modules += (embedding(f"{stack}.embed_tokens", v, h), *_stack(c, stack), rmsnorm(f"{stack}.final_layer_norm", h))
    return Backbone(
        model_type=model_type,
        stem=STEMS[model_type],
        prefix="",
        modules=tuple(modules),
        blocks=tuple(_block(c, stack) for stack in stacks),
        hidden_size=h,
        vocab_size=v,
        embedding="shared",
        ties=tuple((f"{stack}.embed_tokens.weight", "shared.weight") for stack in stacks),
        keep_in_fp32=("wo",),
        supports_flash_attn=False,
        prompt=_prompt(c),
        dropout=Dropout(rate, rate, rate, rate, probability(c, "classifier_dropout")),
    )


def _stack(c: Fields, stack: Stack) -> tuple[Module, ...]:
    h, a, i = c.int("d_model", "hidden_size"), c.int("num_heads", "num_attention_heads"), c.int("d_ff")
    inner = a * c.int("d_kv", "head_dim")
    layers = _layers(c, stack)

    def attention(name: str) -> tuple[Module, ...]:
        at = f"{stack}.block.{{}}.layer.{name}"
        inward = tuple(linear(f"{at}.{part}", h, inner, layers=layers) for part in ("q", "k", "v"))
        return (*inward, linear(f"{at}.o", inner, h, layers=layers))

    def norm(index: int) -> Module:
        return rmsnorm(f"{stack}.block.{{}}.layer.{index}.layer_norm", h, layers)

    buckets = c.int("relative_attention_num_buckets", default=32)
    cross = (*attention("1.EncDecAttention"), norm(1)) if stack == "decoder" else ()
    last = 2 if stack == "decoder" else 1
    mlp, up = f"{stack}.block.{{}}.layer.{last}.DenseReluDense", ("wi_0", "wi_1") if _activation(c)[0] else ("wi",)
    return (
        *attention("0.SelfAttention"),
        embedding(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", buckets, a),
        norm(0),
        *cross,
        *(linear(f"{mlp}.{name}", h, i, layers=layers) for name in up),
        linear(f"{mlp}.wo", i, h, layers=layers),
        norm(last),
    )


def _activation(c: Fields) -> tuple[bool, str]:
    """(gated, activation) of `feed_forward_proj`: `relu`, `gated-silu`; the gelu of `gated-gelu` is `gelu_new`."""
    feed_forward = c.str("feed_forward_proj", default=FEED_FORWARD[c.str("model_type")])
    first, *rest = feed_forward.split("-")
    if (rest and first != "gated") or len(rest) > 1:
        raise InputError(
            f"{c.name}: feed_forward_proj",
            feed_forward,
            "accepted: an activation such as relu, or a gated one such as gated-gelu",
        )
    return bool(rest), "gelu_new" if feed_forward == "gated-gelu" else feed_forward.split("-")[-1]


def _block(c: Fields, stack: Stack) -> Block:
    """Cross-attention has no positions of its own: the library adds a bias of zeros."""
    a, d = c.int("num_heads", "num_attention_heads"), c.int("d_kv", "head_dim")
    gated, activation = _activation(c)
    self_attention = Attention(a, a, d, positions="relative", causal=stack == "decoder")
    cross_attention = Attention(a, a, d, positions="none", causal=False, cross=True)
    return Block(
        stack=stack,
        layers=_layers(c, stack),
        attentions=(self_attention, cross_attention) if stack == "decoder" else (self_attention,),
        mlp=Mlp("gated" if gated else "plain", c.int("d_ff"), activation),
        norm="rmsnorm",
    )
