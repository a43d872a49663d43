"""Liger's fused linear cross entropy, which makes the gradients in forward, chunk by chunk, and keeps them for backward.

n tokens, h hidden size, v vocabulary. Source: liger-kernel `ops/fused_linear_cross_entropy.py`,
`transformers/model/llama.py` (`lce_forward`). Its Triton kernels take nothing. `older_liger`: 0.8.1 makes the logits of
each chunk anew, and the product of each in 16 bits and in 32 before it is added.
"""

from __future__ import annotations

from peftplan.dtypes import SIXTEEN_BITS
from peftplan.errors import InputError
from peftplan.ledger import Dim
from peftplan.memory.loss import chunks, projection, read_by_loss
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Strided, Tensor


def liger(model: Model, x: Tensor) -> tuple[Tensor]:
    """`lce_forward` in training: a loss, no logits."""
    f = model.tape
    if type(x) is Strided:  # `LigerForCausalLMLoss` calls `view`
        logits_to_keep = model.running.logits_to_keep
        raise InputError("logits_to_keep", logits_to_keep, "liger keeps the logits of all tokens, or needs batch_size 1")
    head = projection(model)
    read_by_loss(f, head)
    f.module = ""
    labels = _shifted_labels(model, x.dims[:-1])
    hidden = ops.reshaped(f, x)
    weight = model.table(head.name, head)
    f.module = ""
    loss = _cross_entropy(model, hidden, weight)
    del labels
    return (loss,)


def _shifted_labels(model: Model, dims: Dims) -> tuple[Tensor, ...]:
    """`pad(labels, (0, 1))[..., 1:].contiguous()`: of one sequence a view of what is padded."""
    f, (batch, seq) = model.tape, dims
    padded = f.new((batch, seq + 1 if isinstance(seq, int) else f"{seq}+1"), "int64", "padded labels")
    return (padded, f.new(dims, "int64", "shifted labels")) if model.running.batch_size > 1 else (padded,)


def _cross_entropy(model: Model, hidden: Tensor, weight: Operand) -> Tensor:
    """`LigerFusedLinearCrossEntropyFunction`.

    Hidden states and weight in the dtype of products: these go into one buffer and into the gradient. Else autocast casts for
    each, and makes a new tensor.
    """
    f = model.tape
    node = f.record(_cross_entropy_backward, (hidden, weight))
    dtype = f.autocast or hidden.dtype
    trains = hidden.node is not None
    grad_hidden = f.new(hidden.dims, hidden.dtype, "grad_input")
    grad_weight = f.new(weight.dims, weight.dtype, "grad_weight") if trains and weight.node is not None else None
    losses, mask = f.new(("n",), "fp32", "losses"), f.new(("n",), "bool", "target mask")
    older = model.running.older_liger
    in_place = hidden.dtype == weight.dtype == dtype and not older
    buffer = f.new(("rows", weight.dims[0]), dtype, "logits, in chunks") if in_place else None
    logits: Tensor | None = None
    with f.no_grad():
        for rows in chunks(model):
            logits = buffer or _projected(f, rows, hidden, weight, dtype)  # the last chunk's live until then in the older release
            if trains and not in_place:
                temporaries = f.cast(weight, dtype), f.new((rows, hidden.dims[-1]), dtype, "mm")
                del temporaries
            if grad_weight is not None:
                _add_to_weight(f, rows, hidden, weight, dtype, tensor_cores=model.running.flash, older=older)
            logits = logits if older else None
    del buffer, logits, mask
    loss = f.new((), "fp32", "sum", node)
    f.keep(node, grad_hidden, grad_weight)
    del losses
    return loss


def _projected(f: Tape, rows: Dim, hidden: Tensor, weight: Operand, dtype: str) -> Tensor:
    """`chunk @ weight.t()`: autocast casts views anew each time, the second factor first."""
    weight = f.to(weight, dtype)
    chunk = _chunk(f, rows, hidden, dtype)
    logits = f.new((rows, weight.dims[0]), dtype, "logits of a chunk mm")
    del weight, chunk
    return logits


def _chunk(f: Tape, rows: Dim, hidden: Tensor, dtype: str) -> Tensor | None:
    """A chunk of hidden states in another dtype: a copy, or nothing where it has it."""
    return None if hidden.dtype == dtype else f.new((rows, hidden.dims[-1]), dtype, "to")


def _add_to_weight(f: Tape, rows: Dim, hidden: Tensor, weight: Operand, dtype: str, *, tensor_cores: bool, older: bool) -> None:
    """16-bit products go straight into the gradient on sm80 and later, in the `older` release into an fp32 one alone; others are
    made, and an fp32 copy of them."""
    chunk = _chunk(f, rows, hidden, dtype)
    if tensor_cores and dtype in SIXTEEN_BITS and weight.dtype in ("fp32", *(() if older else (dtype,))):
        return
    product = f.new(weight.dims, dtype, "mm")
    del chunk
    wide = f.to(product, "fp32")
    del product, wide


def _cross_entropy_backward(f: Tape, node: Node, saved: tuple[Tensor | None, Tensor | None], g: Tensor) -> Gradients:
    """What forward made."""
    return saved
