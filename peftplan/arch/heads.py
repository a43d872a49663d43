"""Builds the model class of a task from a backbone (what `AutoModel` builds): prefixed names, a head, and ties."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from peftplan.arch.blocks import Block
from peftplan.arch.fields import MAX_LABELS, Fields
from peftplan.arch.modules import NO_DROPOUT, Architecture, Buffer, Dropout, Module, PromptDims, linear
from peftplan.errors import InputError, UnknownNameError

TASK_TYPES: dict[str, str] = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "MASKED_LM": "ForMaskedLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "IMAGE_CLS": "ForImageClassification",
    "FEATURE_EXTRACTION": "Model",
}
"""peft's `TaskType` names, with MASKED_LM and IMAGE_CLS added, and the class suffix that transformers gives each."""

BERT_DROPOUT = 0.1
"""The default of `hidden_dropout_prob` and `attention_probs_dropout_prob` in BERT's config classes."""

DECODER_CLASSIFIER_DROPOUT = 0.1

DECODER_TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")
"""Tasks for which transformers has generic decoder heads (`transformers/modeling_layers.py`), without question answering."""


class Backbone(NamedTuple):
    """The bare model of a `model_type`, names without prefix, in the order of `named_modules()`.

    `stem` starts transformers' class names (`Llama` in `LlamaForCausalLM`); `prefix` is the attribute under which task models
    hold the bare model (`base_model_prefix`); `embedding` is the token embedding's name inside it.
    """

    model_type: str
    stem: str
    prefix: str
    modules: tuple[Module, ...]
    blocks: tuple[Block, ...]
    hidden_size: int
    vocab_size: int = 0
    embedding: str | None = None
    buffers: tuple[Buffer, ...] = ()
    ties: tuple[tuple[str, str], ...] = ()
    keep_in_fp32: tuple[str, ...] = ()
    keep_in_fp32_strict: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    logits_ops: tuple[str, ...] = ()
    supports_sdpa: bool = True
    supports_flash_attn: bool = True
    prompt: PromptDims | None = None
    dropout: Dropout = NO_DROPOUT
    max_positions: int | None = None

    def model_class(self, task_type: str) -> str:
        """The name of transformers' class for a task: `LlamaForCausalLM`, `BertModel`."""
        return self.stem + TASK_TYPES[task_type]


def check_task(task_type: str, accepted: Iterable[str], *, model_type: str) -> None:
    """Raises UnknownNameError if the model type has no model class for the task."""
    if task_type not in tuple(accepted):
        raise UnknownNameError("task_type", task_type, accepted)


def attach(
    backbone: Backbone,
    task_type: str,
    head: tuple[Module, ...],
    *,
    ties: tuple[tuple[str, str], ...] = (),
    output_embedding: str | None = None,
    model_class: str | None = None,
    head_first: bool = False,
) -> Architecture:
    """The task model: the backbone under its prefix (bare for FEATURE_EXTRACTION), then the head's modules.

    `head_first`: the class registers its head before the backbone (XLM-RoBERTa), so that the head owns the tied weights.
    """
    prefix = "" if task_type == "FEATURE_EXTRACTION" or not backbone.prefix else backbone.prefix + "."
    body = tuple(m._replace(name=prefix + m.name) for m in backbone.modules)
    return Architecture(
        model_type=backbone.model_type,
        model_class=model_class or backbone.model_class(task_type),
        task_type=task_type,
        modules=(*head, *body) if head_first else (*body, *head),
        blocks=backbone.blocks,
        ties=(*((prefix + a, prefix + b) for a, b in backbone.ties), *ties),
        buffers=tuple(b._replace(name=prefix + b.name) for b in backbone.buffers),
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        input_embedding=None if backbone.embedding is None else prefix + backbone.embedding,
        output_embedding=output_embedding,
        keep_in_fp32=backbone.keep_in_fp32,
        keep_in_fp32_strict=backbone.keep_in_fp32_strict,
        frozen=tuple(prefix + name for name in backbone.frozen),
        logits_ops=backbone.logits_ops if output_embedding else (),
        supports_sdpa=backbone.supports_sdpa,
        supports_flash_attn=backbone.supports_flash_attn,
        prompt=backbone.prompt,
        dropout=backbone.dropout,
        max_positions=backbone.max_positions,
    )


def num_labels(c: Fields, *, default: int = 2) -> int:
    """`num_labels` as transformers derives it: stated, or the number of `id2label` entries, or the class's default."""
    labels = c.raw.get("id2label")
    return c.int("num_labels", default=len(labels) if isinstance(labels, dict) and labels else default, high=MAX_LABELS)


def decoder_model(
    backbone: Backbone,
    c: Fields,
    task_type: str,
    *,
    tasks: tuple[str, ...] = DECODER_TASKS,
    tie_word_embeddings: bool = False,
    head_bias: bool = False,
    token_cls_bias: bool = True,
    token_cls: str = "score",
) -> Architecture:
    """A decoder with one of transformers' generic heads: `lm_head` or `score`.

    `tie_word_embeddings` is the config class's own default, used where the config does not state it; `token_cls` names the head
    of TOKEN_CLS, which older classes call `classifier`.
    """
    check_task(task_type, tasks, model_type=backbone.model_type)
    h = backbone.hidden_size
    if task_type == "CAUSAL_LM":
        tied = c.bool("tie_word_embeddings", default=tie_word_embeddings)
        return attach(
            backbone,
            task_type,
            (linear("lm_head", h, backbone.vocab_size, head_bias),),
            ties=(("lm_head.weight", f"{backbone.prefix}.{backbone.embedding}.weight"),) if tied else (),
            output_embedding="lm_head",
        )
    head: tuple[Module, ...] = ()
    if task_type == "SEQ_CLS":
        head = (linear("score", h, num_labels(c)),)
    elif task_type == "TOKEN_CLS":
        head = (linear(token_cls, h, num_labels(c), token_cls_bias),)
    return attach(backbone, task_type, head)


def rotary_buffers(name: str, rotary_dim: int) -> tuple[Buffer, ...]:
    """The two fp32 frequency tables that a rotary embedding registers, rotary_dim / 2 entries each (rounded up)."""
    half = (rotary_dim + 1) // 2
    return tuple(Buffer(f"{name}.{part}", "fp32", (half,)) for part in ("inv_freq", "original_inv_freq"))


def partial_rotary_dim(c: Fields, head_dim: int, *, default: float, legacy: str = "partial_rotary_factor") -> int:
    """How many dimensions of a head are rotated: int(head_dim × partial_rotary_factor) (`modeling_rope_utils.py`).

    The factor stands in `rope_parameters` (formerly `rope_scaling`), or beside it under its `legacy` name.
    """
    rope = c.raw.get("rope_scaling") or c.raw.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise InputError(f"{c.name}: rope_parameters", rope, "accepted: an object with rope_type and its parameters")
    beside = c.number(legacy, default=default, low=0, high=1)
    inside = Fields(rope, name=f"{c.name}: rope_parameters")
    return int(head_dim * inside.number("partial_rotary_factor", default=beside, low=0, high=1))


def equal_head_dim(c: Fields, hidden_size: int, heads: int) -> int:
    """hidden_size / num_attention_heads, for classes that ignore `head_dim`. Raises InputError if the config states another."""
    d = c.divide("hidden_size", hidden_size, "num_attention_heads", heads)
    return c.int("head_dim", default=d, low=d, high=d)


def probability(c: Fields, *names: str, default: float = 0.0) -> float:
    """A dropout probability by its field's names, or the class's own default."""
    return c.number(*names, default=default, low=0, high=1)


def classifier_dropout(c: Fields) -> float:
    """Dropout before a decoder's token classifier (`GenericForTokenClassification`): the first of two fields present, or 0.1."""
    hidden_dropout = probability(c, "hidden_dropout", default=DECODER_CLASSIFIER_DROPOUT)
    return probability(c, "classifier_dropout", default=hidden_dropout)


def dropout_of(c: Fields, *, default: float = BERT_DROPOUT) -> Dropout:
    """BERT's names: one probability after sublayers, of embeddings and, unless stated apart, of the classifier."""
    hidden = probability(c, "hidden_dropout_prob", default=default)
    attention = probability(c, "attention_probs_dropout_prob", default=default)
    return Dropout(hidden, attention, embedding=hidden, classifier=probability(c, "classifier_dropout", default=hidden))


def prompt_dims(c: Fields, num_layers: int, hidden_size: int, heads: int | None) -> PromptDims:
    """`PromptDims` of a config class that has no key/value heads of its own; a stated field is read by peft all the same."""
    kv, d = c.optional_int("num_key_value_heads"), c.optional_int("head_dim")
    return PromptDims(num_layers, hidden_size, heads, num_key_value_heads=kv, head_dim=d)
