"""BART and Whisper: the original Transformer's encoder and decoder, with a norm after each sublayer (BART) or before (Whisper).

Sources: transformers, `models/{bart,whisper}/{configuration,modeling}_*.py`. Letters: h d_model, v vocab_size. Left out:
Whisper's audio classification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from peftplan.arch.bert import classifier
from peftplan.arch.blocks import Attention, Block, Mlp
from peftplan.arch.fields import Fields
from peftplan.arch.heads import Backbone, attach, check_task, num_labels, probability
from peftplan.arch.modules import Architecture, Buffer, Dropout, Module, PromptDims, embedding, layernorm, linear

BART_TASKS = ("SEQ_2_SEQ_LM", "CAUSAL_LM", "SEQ_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
WHISPER_TASKS = ("SEQ_2_SEQ_LM", "CAUSAL_LM", "FEATURE_EXTRACTION")

BART_POSITION_OFFSET = 2
"""Two rows before position 0 (`BartLearnedPositionalEmbedding.offset`)."""
BART_NUM_LABELS = 3
"""`BartConfig`'s own default: entailment, neutral, contradiction."""
WHISPER_CONV_KERNEL = 3
DROPOUTS = {"Bart": 0.1, "Whisper": 0.0}
"""`dropout` where the config does not state it."""

Stack = Literal["encoder", "decoder"]
BOTH: tuple[Stack, ...] = ("encoder", "decoder")


def bart(c: Fields, task_type: str) -> Architecture:
    """BART with the head of a task. CAUSAL_LM is the decoder alone: its cross-attention weights exist but never run."""
    check_task(task_type, BART_TASKS, model_type="bart")
    tied = c.bool("tie_word_embeddings", default=True)
    stacks: tuple[Stack, ...] = ("decoder",) if task_type == "CAUSAL_LM" else BOTH
    h, v, p = c.int("d_model", "hidden_size"), c.int("vocab_size"), c.int("max_position_embeddings")

    modules: list[Module] = [embedding("shared", v, h)] if len(stacks) > 1 else []
    for stack in stacks:
        modules += (
            embedding(f"{stack}.embed_tokens", v, h),
            embedding(f"{stack}.embed_positions", p + BART_POSITION_OFFSET, h),
            *_layers(c, stack, key_bias=True),
            layernorm(f"{stack}.layernorm_embedding", h),
        )
    backbone = _backbone(c, "Bart", task_type, stacks, tuple(modules), norm_position="post")._replace(max_positions=p)
    if task_type == "CAUSAL_LM":
        return _language_model(backbone, task_type, "lm_head", tied=tied)
    sharing = tuple((f"{stack}.embed_tokens.weight", "shared.weight") for stack in stacks) if tied else ()
    backbone = backbone._replace(embedding="shared", ties=sharing)
    if task_type == "SEQ_2_SEQ_LM":
        model = _language_model(backbone, task_type, "lm_head", tied=tied)
        return replace(model, buffers=(Buffer("final_logits_bias", "model", (1, v)),))
    if task_type == "SEQ_CLS":
        labels = num_labels(c, default=BART_NUM_LABELS)
        head = (linear("classification_head.dense", h, h, True), linear("classification_head.out_proj", h, labels, True))
        return attach(backbone, task_type, head)
    # BartForQuestionAnswering sets num_labels = 2, whatever the config says.
    spans = Fields({"num_labels": 2}, name=c.name)
    return attach(backbone, task_type, classifier(spans, task_type, h))


def whisper(c: Fields, task_type: str) -> Architecture:
    """Whisper: the encoder starts with two convolutions over mel frames and frozen sinusoidal positions. Keys have no bias."""
    check_task(task_type, WHISPER_TASKS, model_type="whisper")
    tied = c.bool("tie_word_embeddings", default=True)
    stacks: tuple[Stack, ...] = ("decoder",) if task_type == "CAUSAL_LM" else BOTH
    h, mels = c.int("d_model", "hidden_size"), c.int("num_mel_bins")
    front: Mapping[str, tuple[Module, ...]] = {
        "encoder": (
            _conv("encoder.conv1", mels, h),
            _conv("encoder.conv2", h, h),
            embedding("encoder.embed_positions", c.int("max_source_positions"), h),
        ),
        "decoder": (
            embedding("decoder.embed_tokens", c.int("vocab_size"), h),
            embedding("decoder.embed_positions", c.int("max_target_positions"), h),
        ),
    }
    modules: list[Module] = []
    for stack in stacks:
        modules += (*front[stack], *_layers(c, stack, key_bias=False), layernorm(f"{stack}.layer_norm", h))
    backbone = _backbone(c, "Whisper", task_type, stacks, tuple(modules), norm_position="pre")
    backbone = backbone._replace(max_positions=c.int("max_target_positions"))
    if "encoder" in stacks:
        backbone = backbone._replace(frozen=("encoder.embed_positions.weight",))
    if task_type == "FEATURE_EXTRACTION":
        return attach(backbone, task_type, ())
    return _language_model(backbone, task_type, "proj_out", tied=tied)


def _conv(name: str, n_in: int, n_out: int) -> Module:
    return Module(name, "Conv1d", (("weight", (n_out, n_in, WHISPER_CONV_KERNEL)), ("bias", (n_out,))))


def _language_model(backbone: Backbone, task_type: str, head: str, *, tied: bool) -> Architecture:
    return attach(
        backbone,
        task_type,
        (linear(head, backbone.hidden_size, backbone.vocab_size),),
        ties=((f"{head}.weight", f"{backbone.prefix}.{backbone.embedding}.weight"),) if tied else (),
        # WhisperForCausalLM's `get_output_embeddings()` returns proj_out too.
        output_embedding=head,
    )


def _backbone(
    c: Fields,
    stem: str,
    task_type: str,
    stacks: tuple[Stack, ...],
    modules: tuple[Module, ...],
    *,
    norm_position: Literal["pre", "post"],
) -> Backbone:
    """Both stacks. peft reads the number of layers and heads of the encoder, as the config's `attribute_map` says."""
    h = c.int("d_model", "hidden_size")
    encoder_layers, encoder_heads = c.int("encoder_layers", "num_hidden_layers"), _heads(c, "encoder")
    hidden = probability(c, "dropout", default=DROPOUTS[stem])
    return Backbone(
        model_type=c.str("model_type"),
        stem=stem,
        prefix="model",
        modules=modules,
        blocks=tuple(_block(c, stack, norm_position, cross=len(stacks) > 1) for stack in stacks),
        hidden_size=h,
        vocab_size=c.int("vocab_size"),
        embedding="decoder.embed_tokens",
        prompt=PromptDims(encoder_layers, h, encoder_heads, num_transformer_submodules=2 if task_type == "SEQ_2_SEQ_LM" else 1),
        dropout=Dropout(
            hidden,
            probability(c, "attention_dropout"),
            probability(c, "activation_dropout"),
            embedding=hidden,
            classifier=probability(c, "classifier_dropout"),
        ),
    )


def _heads(c: Fields, stack: Stack) -> int:
    names = ("encoder_attention_heads", "num_attention_heads")
    return c.int(*names) if stack == "encoder" else c.int("decoder_attention_heads")


def _layer_indices(c: Fields, stack: Stack) -> tuple[int, ...]:
    return c.layers("encoder_layers", "num_hidden_layers") if stack == "encoder" else c.layers("decoder_layers")


def _layers(c: Fields, stack: Stack, *, key_bias: bool) -> tuple[Module, ...]:
    """Self-attention, norm; cross-attention, norm (decoder); fc1, fc2, norm."""
    h, i, layers = c.int("d_model", "hidden_size"), c.int(f"{stack}_ffn_dim"), _layer_indices(c, stack)
    at = f"{stack}.layers.{{}}"

    def attention(name: str) -> tuple[Module, ...]:
        biases = {"k_proj": key_bias, "v_proj": True, "q_proj": True, "out_proj": True}
        projections = (linear(f"{at}.{name}.{part}", h, h, bias, layers) for part, bias in biases.items())
        return (*projections, layernorm(f"{at}.{name}_layer_norm", h, layers=layers))

    return (
        *attention("self_attn"),
        *(attention("encoder_attn") if stack == "decoder" else ()),
        linear(f"{at}.fc1", h, i, True, layers),
        linear(f"{at}.fc2", i, h, True, layers),
        layernorm(f"{at}.final_layer_norm", h, layers=layers),
    )


def _block(c: Fields, stack: Stack, norm_position: Literal["pre", "post"], *, cross: bool) -> Block:
    a = _heads(c, stack)
    d = c.divide("d_model", c.int("d_model", "hidden_size"), f"{stack}_attention_heads", a)
    self_attention = Attention(a, a, d, positions="learned", causal=stack == "decoder")
    cross_attention = Attention(a, a, d, positions="none", causal=False, cross=True)
    return Block(
        stack=stack,
        layers=_layer_indices(c, stack),
        attentions=(self_attention, cross_attention) if stack == "decoder" and cross else (self_attention,),
        mlp=Mlp("plain", c.int(f"{stack}_ffn_dim"), c.str("activation_function", default="gelu")),
        norm="layernorm",
        norm_position=norm_position,
    )
