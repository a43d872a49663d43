"""Heads of encoder-decoders (transformers, models/{bart,t5}/modeling_*.py)."""

from __future__ import annotations

from peftplan.memory.encoder_heads import Output, classified, language_loss, logits_of
from peftplan.memory.loss import plain_cross_entropy
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.tensors import Tensor


def bart_lm(model: Model, x: Tensor) -> Output:
    """`BartForConditionalGeneration.forward`: a buffer is added to the logits."""
    f = model.tape
    logits = logits_of(model, x)
    f.module = ""
    bias = Tensor(None, (1, model.arch.vocab_size), model.running.dtype)
    logits = ops.add(f, logits, bias)
    return plain_cross_entropy(f, logits), logits


def t5_lm(model: Model, x: Tensor) -> Output:
    """`T5ForConditionalGeneration.forward`: states are scaled first where the config's embeddings are tied; `decoder_outputs`
    holds them as they were."""
    f = model.tape
    f.module = ""
    if any(alias == "lm_head.weight" for alias, _ in model.arch.ties):
        model.call_locals.append(x)
        x = ops.scale(f, x)
    logits = logits_of(model, x)
    return (Tensor(None, (), "fp32"), logits) if model.running.without_loss else language_loss(model, logits)


def end_classification(model: Model, x: Tensor) -> Output:
    """`BartForSequenceClassification`, `T5ForSequenceClassification`: two layers on the state of each sample's end of text."""
    f, p = model.tape, model.arch.dropout.classifier
    b, s, h = x.dims
    mask = f.new((b, s), "bool", "eos_mask")
    chosen = ops.gathered(f, x, (b, h))
    hidden = ops.dropout(f, chosen, p)
    hidden = ops.keeps_output(f, model.linear("classification_head.dense", hidden), "tanh")
    del mask
    return classified(model, "classification_head.out_proj", ops.dropout(f, hidden, p))
