"""Heads of encoders: masked language models, classifiers of sequences and of tokens, and answers to questions.

Sources: transformers, models/*/modeling_*.py (`…ForMaskedLM`, `…ForSequenceClassification`, `…ForTokenClassification`,
`…ForQuestionAnswering`). Left out: regression and several labels per sample beyond what one label takes (batch × labels).
"""

from __future__ import annotations

from peftplan.errors import NeedsTraceError
from peftplan.memory.activations import activation
from peftplan.memory.loss import causal_lm_loss, plain_cross_entropy
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.shaping import split
from peftplan.tape.tensors import Tensor

Output = tuple[Tensor, Tensor]


def logits_of(model: Model, x: Tensor) -> Tensor:
    """The decoder over the vocabulary."""
    assert model.arch.output_embedding is not None
    return model.linear(model.arch.output_embedding, x)


def language_loss(model: Model, logits: Tensor) -> Output:
    """`CrossEntropyLoss` in the logits' own dtype; `ForCausalLMLoss` for CAUSAL_LM."""
    model.tape.module = ""
    loss = causal_lm_loss if model.arch.task_type == "CAUSAL_LM" else plain_cross_entropy
    return loss(model.tape, logits), logits


def language_model(model: Model, x: Tensor) -> Output:
    """`WhisperForConditionalGeneration.forward`: no more than logits and loss."""
    return language_loss(model, logits_of(model, x))


def transformed(model: Model, x: Tensor, dense: str, norm: str, act: str) -> Tensor:
    """`BertPredictionHeadTransform.forward`."""
    x = model.linear(dense, x)
    model.tape.module = norm.rpartition(".")[0]
    x = activation(model.tape, x, act)
    return model.layernorm(norm, x)


def bert_lm(model: Model, x: Tensor) -> Output:
    """`BertForMaskedLM`, `BertLMHeadModel`."""
    name = "cls.predictions.transform"
    act = model.arch.blocks[0].mlp.activation
    return language_loss(model, logits_of(model, transformed(model, x, f"{name}.dense", f"{name}.LayerNorm", act)))


def roberta_lm(model: Model, x: Tensor) -> Output:
    """`RobertaLMHead.forward`, whose activation is gelu whatever the config says."""
    return language_loss(model, logits_of(model, transformed(model, x, "lm_head.dense", "lm_head.layer_norm", "gelu")))


def bert_classification(model: Model, x: Tensor) -> Output:
    """`BertPooler` and a linear layer, of the first token."""
    f = model.tape
    first = ops.selected(f, x, (x.dims[0], x.dims[2]))
    pooled = ops.keeps_output(f, model.linear("bert.pooler.dense", first), "tanh")
    f.module = "dropout"
    return classified(model, "classifier", ops.dropout(f, pooled, model.arch.dropout.classifier))


def hidden_classification(model: Model, x: Tensor) -> Output:
    """`RobertaClassificationHead.forward`."""
    f, p = model.tape, model.arch.dropout.classifier
    first = ops.dropout(f, ops.selected(f, x, (x.dims[0], x.dims[2])), p)
    hidden = ops.keeps_output(f, model.linear("classifier.dense", first), "tanh")
    return classified(model, "classifier.out_proj", ops.dropout(f, hidden, p))


def deberta_lm(model: Model, x: Tensor) -> Output:
    """`DebertaV2ForMaskedLM.forward` with its legacy head, which is BERT's."""
    if not model.has("cls.predictions.decoder"):
        raise NeedsTraceError("DeBERTa's head with legacy: false")
    return bert_lm(model, x)


def deberta_classification(model: Model, x: Tensor) -> Output:
    """`ContextPooler`, whose activation is gelu unless the config says otherwise, dropout and a linear layer."""
    f = model.tape
    first = ops.selected(f, x, (x.dims[0], x.dims[2]))
    pooled = activation(f, model.linear("pooler.dense", first), "gelu")
    return classified(model, "classifier", ops.dropout(f, pooled, model.arch.dropout.classifier))


def distilbert_lm(model: Model, x: Tensor) -> Output:
    """`DistilBertForMaskedLM.forward`."""
    act = model.arch.blocks[0].mlp.activation
    return language_loss(model, logits_of(model, transformed(model, x, "vocab_transform", "vocab_layer_norm", act)))


def distilbert_classification(model: Model, x: Tensor) -> Output:
    """`DistilBertForSequenceClassification.forward`."""
    f = model.tape
    hidden = model.linear("pre_classifier", ops.selected(f, x, (x.dims[0], x.dims[2])))
    hidden = ops.dropout(f, ops.keeps_output(f, hidden, "relu"), model.arch.dropout.classifier)
    return classified(model, "classifier", hidden)


def distilbert_answering(model: Model, x: Tensor) -> Output:
    """`DistilBertForQuestionAnswering.forward`: dropout before `qa_outputs`."""
    model.tape.module = "dropout"
    return question_answering(model, ops.dropout(model.tape, x, model.arch.dropout.classifier))


def modernbert_lm(model: Model, x: Tensor) -> Output:
    """`ModernBertForMaskedLM.forward`: `ForMaskedLMLoss`, of logits in fp32."""
    logits = logits_of(model, modernbert_head(model, x))
    model.tape.module = ""
    return plain_cross_entropy(model.tape, model.tape.to(logits, "fp32")), logits


def modernbert_head(model: Model, x: Tensor) -> Tensor:
    """`ModernBertPredictionHead.forward`."""
    x = model.linear("head.dense", x)
    model.tape.module = "head.act"
    return model.layernorm("head.norm", activation(model.tape, x, "gelu"))


def modernbert_classification(model: Model, x: Tensor) -> Output:
    """`ModernBertForSequenceClassification.forward`, pooling the first token; `ModernBertForTokenClassification.forward`."""
    f = model.tape
    if model.arch.task_type == "SEQ_CLS":
        x = ops.selected(f, x, (x.dims[0], x.dims[2]))
    hidden = modernbert_head(model, x)
    f.module = "drop"
    return classified(model, "classifier", ops.dropout(f, hidden, model.arch.dropout.classifier))


def modernbert_answering(model: Model, x: Tensor) -> Output:
    """`ModernBertForQuestionAnswering.forward`."""
    f = model.tape
    hidden = modernbert_head(model, x)
    f.module = "drop"
    return spans(model, model.linear("classifier", ops.dropout(f, hidden, model.arch.dropout.classifier)))


def picture_classification(model: Model, x: Tensor) -> Output:
    """`ViTForImageClassification.forward`: a linear layer on the class token."""
    return classified(model, "classifier", ops.selected(model.tape, x, (x.dims[0], x.dims[2])))


def token_classification(model: Model, x: Tensor) -> Output:
    """Dropout and a linear layer on every token."""
    f = model.tape
    f.module = "dropout"
    hidden = ops.dropout(f, x, model.arch.dropout.classifier)
    return classified(model, "classifier", hidden)


def classified(model: Model, name: str, x: Tensor) -> Output:
    """A linear layer over the labels and `CrossEntropyLoss`."""
    logits = model.linear(name, x)
    model.tape.module = ""
    return plain_cross_entropy(model.tape, logits), logits


def question_answering(model: Model, x: Tensor) -> Output:
    """`qa_outputs`, whose two columns are copied; the mean of two losses over positions."""
    f = model.tape
    logits = model.linear("qa_outputs", x)
    f.module = ""
    return spans(model, logits)


def spans(model: Model, logits: Tensor) -> Output:
    """The loss from logits of starts and ends."""
    f = model.tape
    start, end = (ops.copied(f, part, "clone") for part in split(f, logits, [logits.dims[:-1]] * 2))
    positions = f.many(("b",), "int64", "clamp", 2)
    losses = plain_cross_entropy(f, start), plain_cross_entropy(f, end)
    loss = ops.scale(f, ops.add(f, *losses), "div")
    del positions
    model.outputs.append(end)
    return loss, start
