"""Scores of texts, of the logits of two words at their ends, as ms-swift's generative rerankers make them.

b texts, or rows of texts; s tokens; v vocabulary. Source: ms-swift 4.6.0, utils/torch_utils.py
(`get_generative_reranker_logits`, the head's forward), trainers/reranker_trainer.py. Left out: numbers of each text
(loss/reranker.py).
"""

from __future__ import annotations

from peftplan.memory.decoder_heads import indexed
from peftplan.memory.embedded_rows import gathered, texts_apart
from peftplan.memory.loss import plain_cross_entropy
from peftplan.memory.model import Model
from peftplan.memory.units import TAIL
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Operand, Tensor

WORDS = 2


def score_of_words(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the score of each text: the logit of the one word less that of the other."""
    f, rows = model.tape, x.dims[0]
    assert model.arch.output_embedding is not None
    head = model.part(model.arch.output_embedding)
    f.module = ""
    if model.running.parts_of_row > 1:
        x = gathered(f, x, model.running.parts_of_row)
    if model.running.scores_words == "texts of a row":
        x = texts_apart(f, x)

    def of_words(x: Tensor) -> Tensor:
        f.module = head.name
        logits = products.linear(f, x, _rows_of_words(f, head.own_weight))
        return ops.selected(f, logits, (*x.dims[:-1], 1))

    def called(x: Tensor) -> Tensor:
        return f.call(head.name, None, (head.weight, head.bias), x, of_words)

    scores = model.units.leave(TAIL, model.grouped(model.units.enter_with(TAIL, x), called))
    f.module = ""
    score = indexed(f, scores, (rows, 1))
    return plain_cross_entropy(f, score), score


def _rows_of_words(f: Tape, weight: Operand) -> Tensor:
    """`weight[[yes, no]]`, whose gradient is as large as the weight."""
    dims = (WORDS, *weight.dims[1:])
    return f.new(dims, weight.dtype, "index", f.record(_rows_backward, (weight,), weight.dims))


def _rows_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "index_put")
