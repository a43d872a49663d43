"""The embeddings of pairs of texts, and their loss with the other pairs of a batch as negatives.

b pairs, s tokens, h hidden size. Each column of a pair runs through the model by itself, as a forward with a graph. Source:
sentence-transformers 6.2, base/trainer.py (`compute_loss`), base/losses/merged_forward.py (`embed_columns`),
sentence_transformer/modules/pooling.py (`_forward_padded`, `lasttoken` and `mean`), sentence_transformer/modules/normalize.py,
sentence_transformer/losses/multiple_negatives_ranking.py. Left out: numbers of whole rows.
"""

from __future__ import annotations

from peftplan.memory.model import Model
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor

POOLER = "pooler.dense"


def pooled(model: Model, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """No loss, the hidden states, and an embedding of each text, under the model's autocast: of a decoder the state of its last
    token, of an encoder the mean over its tokens. The class's own pooler runs too, and what it gives is dropped."""
    f, (rows, _, width) = model.tape, x.dims
    if model.has(POOLER):
        ops.keeps_output(f, model.linear(POOLER, ops.selected(f, x, (rows, width))), "tanh")
    f.module = ""
    seen = f.new((rows, model.seq, 1) if model.arch.blocks[0].stack == "encoder" else x.dims, x.dtype, "mask")
    masked = ops.mul(f, x, seen)
    del seen
    if model.arch.blocks[0].stack == "encoder":
        total = f.new((rows, width), "fp32", "sum", f.record(_summed_backward, (masked,), masked.dims, masked.dtype))
        embedding = f.to(ops.divide(f, total, f.new((rows, 1), "fp32", "clamp")), x.dtype)
    else:
        embedding = ops.gathered(f, masked, (rows, width))
    del masked
    return Tensor(None, (), "fp32"), x, normalized(f, ops.copied(f, embedding, "cat"))


def _summed_backward(f: Tape, node: Node, saved: tuple[Dims, str], g: Tensor) -> Tensor:
    """An expanded view, written out where the sum is in a wider dtype."""
    dims, dtype = saved
    return Tensor(g.storage, dims, g.dtype) if g.dtype == dtype else f.new(dims, dtype, "to")


def normalized(f: Tape, x: Tensor) -> Tensor:
    """`normalize`: keeps x and its norms."""
    wide = f.to(x, "fp32") if f.autocast else x
    norms = f.new((x.dims[0], 1), wide.dtype, "norm")
    return f.new(x.dims, wide.dtype, "div", f.record(_normalized_backward, (wide,), wide.detach(), norms))


def _normalized_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Tensor:
    """`div_backward` of both arguments, and `linalg_vector_norm_backward`."""
    by_norms = f.new(g.dims, g.dtype, "neg")
    of_x = f.new(g.dims, g.dtype, "div")
    of_norms = f.new(g.dims, g.dtype, "mul")
    del by_norms
    total = f.new(g.dims, g.dtype, "add")
    del of_x, of_norms
    return total


def ranking_loss(f: Tape, queries: Tensor, documents: Tensor) -> Tensor:
    """`MultipleNegativesRankingLoss` of two columns, outside of autocast."""
    rows = queries.dims[0]
    mine, theirs = (normalized(f, ops.copied(f, x, "index", viewed=False)) for x in (queries, documents))
    similarities = ops.scale(f, products.matmul(f, mine, theirs, (rows, rows), transposed=True))
    del mine, theirs
    scores = ops.copied(f, similarities, "cat")
    del similarities
    log_z = ops.keeps_output(f, scores, "logsumexp")
    return ops.summed(f, log_z)
