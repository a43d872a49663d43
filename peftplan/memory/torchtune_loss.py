"""torchtune's losses: one projects the scored tokens in chunks, an older one takes logits in chunks; and plain cross entropy.

n scored tokens, h hidden size, v vocabulary. Source: torchtune at bd2a0fc7, modules/loss/cross_entropy_loss.py
(`LinearCrossEntropyLoss`), modules/transformer.py (`chunked_output`), recipes/lora_finetune_single_device.py (`_loss_step`);
torchtune 0.6.1, modules/loss/ce_chunked_output_loss.py (`CEWithChunkedOutputLoss`), which the recipes of 0.3 to 0.6.1 take.
"""

from __future__ import annotations

from peftplan.job.loss_sizes import CHUNKS
from peftplan.memory.loss import causal_lm_loss
from peftplan.memory.model import Model
from peftplan.memory.units import TAIL
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Strided, Tensor


def linear_cross_entropy(model: Model, x: Tensor) -> tuple[Tensor]:
    """`LinearCrossEntropyLoss.forward`, and the product with the number of tokens that the recipe takes.

    `tensor_split` makes the first n % 8 chunks longer by one. Log-probabilities of all chunks wait in fp32 for backward.
    """
    f, head = model.tape, model.arch.output_embedding
    assert head is not None
    f.module = ""
    rows, targets = _scored(f, x)
    longer = model.running.loss_facts[-1]
    views = [sliced(f, rows, ("longer" if number < longer else "chunk", rows.dims[1])) for number in range(CHUNKS)]
    total = f.new((), "fp32", "total loss")
    while views:
        total = ops.add_(f, total, _of_chunk(model, head, views.pop(0)))
    del targets
    return (ops.scale(f, ops.scale(f, total, "div")),)


def _scored(f: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and labels that are not ignored (`mask_inputs`)."""
    counted = f.new(("b", x.dims[1]), "bool", "label mask"), f.new(("n", 2), "int64", "nonzero")
    del counted
    mask = f.new(("b", x.dims[1]), "bool", "label mask")
    indices = f.new(("n", 1), "int64", "nonzero")
    del mask
    node = f.record(_scored_backward, (x,), x.dims, indices)
    return f.new(("n", x.dims[2]), x.dtype, "index_select", node), f.new(("n",), "int64", "scored labels")


def _scored_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "index_select_backward")


def _of_chunk(model: Model, head: str, x: Tensor) -> Tensor:
    """`compute_cross_entropy`: the summed loss of one chunk. Under FSDP2 each call of the head is a forward of its own
    (`iter_forward_root`)."""
    f = model.tape
    logits = model.units.leave(TAIL, model.linear(head, model.units.enter_with(TAIL, x)))
    model.units.end_forward()
    f.module = ""
    return summed_cross_entropy(f, logits)


def summed_cross_entropy(f: Tape, logits: Tensor) -> Tensor:
    """The summed loss of logits, which the caller holds."""
    log_probabilities = ops.keeps_output(f, f.to(logits, "fp32"), "log_softmax")
    node = f.record(_nll_backward, (log_probabilities,), log_probabilities.dims)
    f.keep(node, log_probabilities.detach())
    loss = f.new((), "fp32", "nll_loss", node)
    f.keep(node, f.new((), "fp32", "nll_loss total weight"))
    return loss


def _nll_backward(f: Tape, node: Node, saved: tuple[Dims, Tensor, Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0], "fp32", "nll_loss_backward")


def chunks_of_logits(model: Model, x: Tensor) -> tuple[Tensor, ...]:
    """`TransformerDecoder.chunked_output`. The first s % 8 chunks are longer by one token."""
    head = model.arch.output_embedding
    assert head is not None
    rows, _, width = x.dims
    longer = model.running.loss_facts[-1]
    views = [sliced(model.tape, x, (rows, "longer" if number < longer else "chunk", width)) for number in range(CHUNKS)]
    if model.running.batch_size > 1:
        views = [Strided(view.storage, view.dims, view.dtype, view.node) for view in views]
    return (Tensor(None, (), "fp32"), *(model.linear(head, view) for view in views))


def chunked_cross_entropy(f: Tape, chunks: list[Tensor]) -> Tensor:
    """`CEWithChunkedOutputLoss.forward`, which widens one chunk after another, and the product with the number of tokens. The
    recipe holds all chunks until the loss is made.
    """
    f.module = ""
    total = f.new((), "fp32", "total loss")
    for logits in chunks:
        total = ops.add_(f, total, summed_cross_entropy(f, logits))
    return ops.scale(f, ops.scale(f, total, "div"))


def cross_entropy(model: Model, x: Tensor) -> tuple[Tensor]:
    """`CrossEntropyLoss` of fp32 logits (`TransformerDecoder.unembed`), which the recipe drops before backward."""
    f, head = model.tape, model.arch.output_embedding
    assert head is not None
    return (causal_lm_loss(f, f.to(model.linear(head, x), "fp32")),)
