"""Unsloth's loss by torch.func, of a model whose forward hands it more than the fused kernel takes: chunks of 16-bit logits.

Every chunk's gradient of a head that trains is added to one of them all. Source: unsloth_zoo 2026.10.9
`fused_losses/cross_entropy_loss.py` (`UnslothFusedLoss`, `_use_chunked_ce`), compiled; as on a card with 8 GiB free. The first
step times the kernel that writes the gradient of the logits.
"""

from __future__ import annotations

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
    f.module = ""
    targets = f.new(x.dims[:-1], "int64", "empty_like")
    node = f.record(_backward, (x, weight) if trains else (x,))
    with f.no_grad():
        grad_hidden = f.new(x.dims, x.dtype, "empty_like")
        grad_weight = f.new(weight.dims, weight.dtype, "zeros_like") if trains else None
        for _ in range(1 + model.running.loss_facts[-1]):
            narrow = f.new(("function rows", width), weight.dtype, "to") if x.dtype != weight.dtype else None
            f.products.append((len(f.log), "cuBLAS"))
            logits = f.new(("function rows", vocab), weight.dtype, "logits, in chunks")
            assert logits.storage is not None
            f.category[logits.storage.number] = "logits"
            statistics = f.new(("function rows", STATISTICS), "fp32", "log-sum-exp")
            of_logits = f.new(logits.dims, weight.dtype, "gradient of logits")
            if model.running.tunes and not model.micro_batch:
                _flushed = f.new((FLUSHED_BYTES,), "uint8", "written over the cache")
                del _flushed
            del logits, statistics
            of_hidden = f.new(("function rows", width), weight.dtype, "mm")
            of_weight = f.new(weight.dims, weight.dtype, "mm") if trains else None
            del narrow, of_logits, of_weight, of_hidden
    loss = f.new((), "fp32", "sum", node)
    del targets
    f.keep(node, grad_hidden, *(() if grad_weight is None else (grad_weight,)))
    return (loss,)


def _backward(f: Tape, node: Node, saved: tuple[Tensor, ...], g: Tensor) -> Gradients:
    """Each gradient scaled into a tensor of its own."""
    return [f.new(grad.dims, grad.dtype, "mul") for grad in saved]
