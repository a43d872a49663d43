"""Unsloth's loss by torch.func, of a model whose forward hands it more than the fused kernel takes: chunks of 16-bit logits.

Every chunk's gradient of a head that trains is added to one of them all. Source: unsloth_zoo 2026.10.9
`fused_losses/cross_entropy_loss.py` (`UnslothFusedLoss`, `_use_chunked_ce`), compiled; as on a card with 8 GiB free. The first
step times the kernel that writes the gradient of the logits. Where torch cannot compile it, it runs op by op in fp32
(`compute_fused_ce_loss`, `fused_losses/stable_softmax.py`, `_centred`); left out there: numbers per token of a chunk.
"""

from __future__ import annotations

from peftplan.ledger import Dim
from peftplan.memory.loss import projection
from peftplan.memory.model import Model
from peftplan.memory.timed import FLUSHED_BYTES
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Tensor

STATISTICS = 5
"""fp32 numbers per token of a chunk."""


def by_function(model: Model, x: Tensor) -> tuple[Tensor]:
    """`unsloth_fused_ce_loss`: a loss, no logits."""
    f = model.tape
    weight = projection(model).own_weight
    trains = weight.trainable
    vocab, width = weight.dims
    assert model.running.recorded is not None
    of_chunk = _op_by_op if model.running.recorded.loss_op_by_op else _compiled
    f.module = ""
    targets = f.new(x.dims[:-1], "int64", "empty_like")
    node = f.record(_backward, (x, weight) if trains else (x,))
    with f.no_grad():
        grad_hidden = f.new(x.dims, x.dtype, "empty_like")
        grad_weight = f.new(weight.dims, weight.dtype, "zeros_like") if trains else None
        for _ in range(1 + model.running.loss_facts[-1]):
            narrow = f.new(("function rows", width), weight.dtype, "to") if x.dtype != weight.dtype else None
            f.products.append((len(f.log), "cuBLAS"))
            of_logits, *kept = of_chunk(model, vocab, weight.dtype)
            of_hidden = f.new(("function rows", width), weight.dtype, "mm")
            of_weight = f.new(weight.dims, weight.dtype, "mm") if trains else None
            del narrow, of_logits, of_weight, of_hidden, kept
    loss = f.new((), "fp32", "sum", node)
    del targets
    f.keep(node, grad_hidden, *(() if grad_weight is None else (grad_weight,)))
    return (loss,)


def _logits(f: Tape, vocab: Dim, dtype: str) -> Tensor:
    logits = f.new(("function rows", vocab), dtype, "logits, in chunks")
    assert logits.storage is not None
    f.category[logits.storage.number] = "logits"
    return logits


def _compiled(model: Model, vocab: Dim, dtype: str) -> list[Tensor]:
    """The gradient of a chunk's logits."""
    f = model.tape
    logits = _logits(f, vocab, dtype)
    statistics = f.new(("function rows", STATISTICS), "fp32", "log-sum-exp")
    of_logits = f.new(logits.dims, dtype, "gradient of logits")
    if model.running.tunes and not model.micro_batch:
        _flushed = f.new((FLUSHED_BYTES,), "uint8", "written over the cache")
        del _flushed
    del logits, statistics
    return [of_logits]


def _op_by_op(model: Model, vocab: Dim, dtype: str) -> list[Tensor]:
    """The same, and what the graph holds until the chunk's gradients are made: which column is the target, and the softmax."""
    f = model.tape
    logits = _logits(f, vocab, dtype)
    dims = logits.dims
    wide = f.new(dims, "fp32", "float")
    centred = f.new(dims, "fp32", "sub")
    columns = f.new((vocab,), "int64", "arange")
    is_target = f.new(dims, "bool", "eq")
    del columns
    of_target = f.new(dims, "fp32", "where")
    del of_target
    others = f.new(dims, "fp32", "where")
    exponentials = f.new(dims, "fp32", "exp, in logsumexp")
    del exponentials, centred, wide, logits
    difference = f.new(dims, "fp32", "sub")
    softmax = f.new(dims, "fp32", "exp")
    of_others = f.new(dims, "fp32", "mul")
    del difference, others
    of_centred = f.new(dims, "fp32", "where")
    del of_others
    of_target = f.new(dims, "fp32", "where")
    summed = f.new(dims, "fp32", "add")
    del of_centred, of_target
    of_logits = f.new(dims, dtype, "to")
    del summed
    return [of_logits, is_target, softmax]


def _backward(f: Tape, node: Node, saved: tuple[Tensor, ...], g: Tensor) -> Gradients:
    """Each gradient scaled into a tensor of its own."""
    return [f.new(grad.dims, grad.dtype, "mul") for grad in saved]
