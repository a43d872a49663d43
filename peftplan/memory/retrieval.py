"""NeMo Automodel's recipes for retrieval: embeddings of queries and of their passages, or a score of each passage with its query.

b queries, s tokens, h hidden size. Queries run first and passages after them, in one graph; a cross-encoder has a row of each
passage. Source: nemo_automodel 0.7.0, recipes/retrieval/train_bi_encoder.py, train_cross_encoder.py (`_forward_backward_step`),
_transformers/retrieval.py (`BiEncoderModel.encode`, `pool`), components/models/llama_bidirectional/model.py. Left out: scores.
"""

from __future__ import annotations

from peftplan.job.loss_sizes import OF_PASSAGES
from peftplan.memory.answers import Renamed
from peftplan.memory.embedded_pairs import normalized
from peftplan.memory.fused_attention import number
from peftplan.memory.loss import plain_cross_entropy
from peftplan.memory.model import Model
from peftplan.memory.model_outputs import outputs_of
from peftplan.tape import ops
from peftplan.tape.column_sums import BUFFERS, TokenSums
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor

MASKED = ("input_ids", "attention_mask")


def embedded(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """No loss, and an embedding of each text."""
    return Tensor(None, (), "fp32"), normalized(model.tape, mean_of_tokens(model, x))


def scored(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """No loss, and a score of each row."""
    pooled = mean_of_tokens(model, x)
    del x
    scores = model.linear("score", pooled)
    model.tape.module = ""
    return Tensor(None, (), "fp32"), ops.scale(model.tape, scores)


def mean_of_tokens(model: Model, x: Tensor) -> Tensor:
    """The mean over the tokens that are no padding."""
    f, (rows, tokens, width) = model.tape, x.dims
    f.module = ""
    seen = f.new((rows, tokens, 1), "bool", "to")
    padding = f.new((rows, tokens, 1), "bool", "bitwise_not")
    del seen
    masked = f.new(x.dims, x.dtype, "masked_fill", f.record(_masked_backward, (x,), x.dims, padding))
    total = f.new((rows, width), x.dtype, "sum", f.record(_expanded, (masked,), masked.dims))
    buffers = [f.new((TokenSums(rows, tokens, number(width), f.card, what),), "fp32", what) for what in BUFFERS]
    while buffers:
        buffers.pop()
    del masked, padding
    return ops.scale(f, total)


def _masked_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "masked_fill")


def _expanded(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return Tensor(g.storage, saved[0], g.dtype)


def batch_of_texts(f: Tape) -> dict[str, Tensor]:
    """Queries, and passages apart from them."""
    passages = {f"d_{name}": f.new((f"{OF_PASSAGES}b", "s"), "int64", name) for name in MASKED}
    return passages | {f"q_{name}": f.new(("b", "s"), "int64", name) for name in MASKED}


def loss_of_passages(model: Model) -> Tensor:
    """The cross entropy of the scores of each query's passages."""
    f, running = model.tape, model.running
    first = outputs_of(model)[1]
    if model.arch.task_type == "SEQ_CLS":  # whose outputs, with a cache, live until backward is done
        return plain_cross_entropy(f, ops.scale(f, f.to(first, "fp32")))
    model.kept.clear()
    f.read_another(Renamed(OF_PASSAGES), several=True)
    model.running, model.pass_name = running._replace(batch_size=running.batch_size * running.passages), "/passages"
    passages = outputs_of(model)[1]
    model.kept.clear()
    model.running, model.pass_name, f.module = running, "", ""
    repeated = ops.copied(f, first, "repeat", viewed=False)
    scores = ops.mul(f, repeated, passages)
    return ops.summed(f, scores)
