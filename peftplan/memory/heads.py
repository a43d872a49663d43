"""From hidden states to the loss: the head of each task, as in transformers' model classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

from peftplan.arch.modules import VALUE_HEAD
from peftplan.errors import NeedsTraceError
from peftplan.job.loss_sizes import CUT_APART
from peftplan.memory.loss import causal_lm_loss, plain_cross_entropy, selected_without_last, without_last
from peftplan.memory.model import Model
from peftplan.memory.units import TAIL
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tensors import Strided, Tensor

Head = Callable[[Model, Tensor], tuple[Tensor, ...]]
"""Model and last hidden states → the loss, and the logits if the outputs hold them."""


def causal_lm(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """`…ForCausalLM.forward`: logits of every position and their loss."""
    logits = logits_of(model, x)
    if model.running.logits_in_fp32 or model.running.masks_logits:
        logits = model.tape.to(logits, "fp32")
    if model.running.masks_logits:
        return plain_cross_entropy(model.tape, selected_without_last(model.tape, logits)), logits
    if model.running.loss_of_16_bits:
        return plain_cross_entropy(model.tape, without_last(model.tape, logits)), logits
    shifted = model.batch.get("shift_labels")
    return causal_lm_loss(model.tape, logits, shifts=model.running.shifts_logits, shifted=shifted), logits


def logits_of(model: Model, x: Tensor) -> Tensor:
    """Logits of every position, scaled or soft-capped where the class does."""
    f, head = model.tape, model.arch.output_embedding
    assert head is not None
    logits = model.units.leave(TAIL, model.grouped(model.units.enter_with(TAIL, x), lambda x: model.linear(head, x)))
    f.module = ""
    for op in model.arch.logits_ops:
        if op == "scale":
            logits = ops.scale(f, logits, op)
            continue
        if op == "float":
            logits = f.to(logits, "fp32")
            continue
        logits = ops.scale(f, logits, "div")  # soft-capped
        logits = ops.keeps_output(f, logits, "tanh")
        logits = ops.scale(f, logits)
    return logits


def of_last_tokens(head: Head, model: Model, x: Tensor) -> tuple[Tensor, ...]:
    """A head of `hidden_states[:, -n:, :]` (transformers, modeling_utils.py `slice_logits_to_keep`)."""
    running, (batch, _, width) = model.running, x.dims
    assert running.logits_to_keep is not None
    last = sliced(model.tape, x, (batch, running.logits_to_keep, width))
    if running.batch_size > 1 and running.logits_to_keep < running.seq_len:
        last = Strided(last.storage, last.dims, last.dtype, last.node)
    return head(model, last)


Place = tuple[str, str]
"""A function of a module in `peftplan.memory`, which is imported on first use."""
ROBERTAS = ("roberta", "xlm-roberta")

HEADS: dict[str, Place] = {
    "CAUSAL_LM": ("heads", "causal_lm"),
    "IMAGE_CLS": ("encoder_heads", "picture_classification"),
    "SEQ_CLS": ("decoder_heads", "last_token"),
    "TOKEN_CLS": ("encoder_heads", "token_classification"),
    "QUESTION_ANS": ("encoder_heads", "question_answering"),
}
"""Task → head."""

OF_MODEL: dict[tuple[str, str], Place] = {
    **{("bert", task): ("encoder_heads", "bert_lm") for task in ("MASKED_LM", "CAUSAL_LM")},
    ("bert", "SEQ_CLS"): ("encoder_heads", "bert_classification"),
    **{(name, task): ("encoder_heads", "roberta_lm") for name in ROBERTAS for task in ("MASKED_LM", "CAUSAL_LM")},
    **{(name, "SEQ_CLS"): ("encoder_heads", "hidden_classification") for name in ROBERTAS},
    ("deberta-v2", "MASKED_LM"): ("encoder_heads", "deberta_lm"),
    ("deberta-v2", "SEQ_CLS"): ("encoder_heads", "deberta_classification"),
    ("distilbert", "MASKED_LM"): ("encoder_heads", "distilbert_lm"),
    ("distilbert", "SEQ_CLS"): ("encoder_heads", "distilbert_classification"),
    ("distilbert", "QUESTION_ANS"): ("encoder_heads", "distilbert_answering"),
    ("bart", "SEQ_2_SEQ_LM"): ("seq2seq_heads", "bart_lm"),
    ("whisper", "SEQ_2_SEQ_LM"): ("encoder_heads", "language_model"),
    ("bart", "SEQ_CLS"): ("seq2seq_heads", "end_classification"),
    ("t5", "SEQ_2_SEQ_LM"): ("seq2seq_heads", "t5_lm"),
    ("mt5", "SEQ_2_SEQ_LM"): ("seq2seq_heads", "t5_lm"),
    ("t5", "SEQ_CLS"): ("seq2seq_heads", "end_classification"),
    ("mt5", "SEQ_CLS"): ("seq2seq_heads", "end_classification"),
    ("modernbert", "MASKED_LM"): ("encoder_heads", "modernbert_lm"),
    **{("modernbert", task): ("encoder_heads", "modernbert_classification") for task in ("SEQ_CLS", "TOKEN_CLS")},
    ("modernbert", "QUESTION_ANS"): ("encoder_heads", "modernbert_answering"),
}
"""(model type, task) → head, for classes with a head of their own."""


OF_LOSS: dict[str, Place] = {
    "trl-chunked": ("chunked_loss", "trl_chunked"),
    "liger": ("liger_loss", "liger"),
    "unsloth": ("unsloth_loss", "unsloth"),
    "unsloth-logits": ("unsloth_loss", "of_all_logits"),
    "torchtune-linear": ("torchtune_loss", "linear_cross_entropy"),
    "cut-cross-entropy": ("cut_loss", "cut"),
}
"""Loss → the head that replaces that of a causal language model."""


def head_of(model: Model) -> Head:
    """The head of a model's task, or of a loss that never materializes all logits; of the last tokens where not all have logits.

    Raises NeedsTraceError for tasks that only the trace engine knows.
    """
    head = _head_of(model)
    return head if model.running.logits_to_keep is None else partial(of_last_tokens, head)


def _head_of(model: Model) -> Head:
    task, model_type = model.arch.task_type, model.arch.model_type
    loss = model.running.loss
    if model.running.passages:
        return _imported(("retrieval", "scored" if task == "SEQ_CLS" else "embedded"))
    if task == "FEATURE_EXTRACTION":
        return _imported(("embedded_pairs", "pooled"))
    if model.running.embeds_rows:
        return _imported(("embedded_rows", "last_of_texts"))
    if model.running.scores_words is not None:
        return _imported(("reranker", "score_of_words"))
    if model.has(VALUE_HEAD):
        return _imported(("value_head", "with_values"))
    if model.running.mtp_depths:
        return _imported(("further_tokens", "logits_and_depths"))
    if loss == CUT_APART:
        return _imported(("cut_apart", "hidden_and_last"))
    if loss in ("torchtune-kl", "torchtune-chunked"):
        return _imported(("torchtune_loss", "chunks_of_logits"))
    if model.running.without_loss and loss in ("trl-chunked", "unsloth"):
        return _imported(("distillation", "hidden_states"))
    if model.running.without_loss and task == "CAUSAL_LM" and (model_type, task) not in OF_MODEL:
        return _imported(("pair_logits", "all_logits"))
    if loss != "full" and (task != "CAUSAL_LM" or (model_type, task) in OF_MODEL or loss not in OF_LOSS):
        raise NeedsTraceError(f"the {loss} loss of {model_type} for {task}")
    if loss == "unsloth" and model.running.recorded is not None and model.running.recorded.by_function:
        return _imported(("unsloth_function_loss", "by_function"))
    if loss == "unsloth" and model.running.of_completions:
        return _imported(("unsloth_loss", "of_completions"))
    if loss != "full":
        return _imported(OF_LOSS[loss])
    if model.running.own_modules:
        return _imported(("torchtune_loss", "cross_entropy"))
    place = OF_MODEL.get((model_type, task)) or HEADS.get(task)
    if task == "TOKEN_CLS" and model.arch.blocks[0].stack == "decoder":
        place = ("decoder_heads", "every_token")
    if place is None:
        raise NeedsTraceError(f"activations of {model_type} for {task}")
    return _imported(place)


def _imported(place: Place) -> Head:
    module, function = place
    head: Head = getattr(import_module(f"peftplan.memory.{module}"), function)
    return head
