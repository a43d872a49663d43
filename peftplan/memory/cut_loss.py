"""Cut cross entropy, whose kernels project, score and differentiate block by block: the logits are never materialized.

n scored labels, t hidden states, h hidden size, v vocabulary. Source: the fork of Apple's cut-cross-entropy that axolotl names
(github.com/axolotl-ai-cloud/ml-cross-entropy at 5f0c7a7), `transformers/utils.py` (`apply_lce`), `cce.py`, `cce_lse_forward.py`,
`indexed_dot.py`, `cce_backward.py`. Its Triton kernels take nothing but the locks that are named here.
"""

from __future__ import annotations

from typing import TypeAlias

from peftplan.job.loss_sizes import LOCKED_COLUMNS, LOCKED_ROWS, SORTED_BYTES, check_halves
from peftplan.memory.loss import projection, read_by_loss
from peftplan.memory.model import Model
from peftplan.memory.timed import FLUSHED_BYTES
from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Operand, Tensor
from peftplan.units import ceil_div

Saved: TypeAlias = tuple[Tensor, Operand, Operand | None, bool, Tensor, Tensor, Tensor]
"""Hidden states, head, its bias, whether kernels are timed, which labels are scored, log-sums of their logits, and the average
logit of each entry."""


def cut(model: Model, x: Tensor) -> tuple[Tensor]:
    """`apply_lce` in training: the sum over scored labels, divided by their number."""
    f = model.tape
    head = projection(model)
    read_by_loss(f, head)
    f.module = ""
    weight = model.table(head.name, head)
    _hidden_states = x
    if "scale" in model.arch.logits_ops:  # `hidden_states / self.config.logits_scaling`
        x = ops.scale(f, x, "div")
    hidden = ops.reshaped(f, f.to(x, weight.dtype) if weight.dtype == "bf16" else x)
    check_halves(hidden.dtype, weight.dtype)
    labels = _scored(f)
    loss = _cross_entropy(model, hidden, weight, head.bias, labels)
    return (ops.scale(f, loss, "div"),)


def _scored(f: Tape) -> Tensor:
    """`_build_flat_valids`: where in the batch the scored labels stand."""
    mask = f.new(("n",), "bool", "ne")
    wide = f.new(("n", 2), "int64", "nonzero")
    del mask
    narrow = f.new(("n", 2), "int32", "to")
    del wide
    valid = f.new(("n",), "int64", "valid labels")
    del narrow
    return valid


def _cross_entropy(model: Model, hidden: Tensor, weight: Operand, bias: Operand | None, labels: Tensor) -> Tensor:
    """`LinearCrossEntropyFunction`: keeps what it read, and a number for each label and each entry of the vocabulary."""
    f = model.tape
    node = f.record(_backward, (hidden, weight, bias), hidden, weight, bias, model.running.tunes, labels)
    log_sum = f.new(("n",), "fp32", "log-sum-exp")
    locks = f.new(("n/128",), "int32", "locks")
    logit_average = f.new((weight.dims[0],), "fp32", "average logits") if node is not None else None
    del locks
    negative = f.new(("n",), "fp32", "negative dot")
    if "softcap" in model.arch.logits_ops:
        negative = f.new(("n",), "fp32", "soft-capped")
    loss = f.new((), "fp32", "sum", node)
    f.keep(node, log_sum, logit_average)
    del negative
    return loss


def _backward(f: Tape, node: Node, saved: Saved, g: Tensor) -> Gradients:
    """Gradients in the dtypes of what they belong to, each but the bias's with its locks."""
    hidden, weight, bias, tunes, _, _, average = saved
    ordering = _order(f, average, tunes=tunes)
    into_hidden, into_weight, into_bias = (edge is not None for edge in node.edges)
    grad_hidden = f.new(hidden.dims, hidden.dtype, "zeros_like") if into_hidden else None
    grad_weight = f.new(weight.dims, weight.dtype, "zeros_like") if into_weight else None
    wide = f.new(bias.dims, "fp32", "zeros_like") if into_bias and bias is not None else None
    columns = ceil_div(int(hidden.dims[-1]), LOCKED_COLUMNS)
    rows = ["n/128"] * into_hidden + [ceil_div(int(weight.dims[0]), LOCKED_ROWS)] * into_weight
    locks = [f.new((of_rows, columns), "int32", "locks") for of_rows in rows]
    grad_bias = None if wide is None or bias is None else f.new(wide.dims, bias.dtype, "to")
    del locks, ordering
    return grad_hidden, grad_weight, grad_bias


def _order(f: Tape, average: Tensor, *, tunes: bool) -> Tensor:
    """`argsort`, as int32: compiled, so that the first step times a kernel."""
    values = f.new(average.dims, "fp32", "sort")
    indices = f.new(average.dims, "int64", "sort")
    unsorted = f.new(average.dims, "int64", "arange")
    radix_sort = f.new((SORTED_BYTES * int(average.dims[0]),), "uint8", "radix sort")
    del unsorted, radix_sort, values
    ordering = f.new(average.dims, "int32", "to")
    if tunes:
        flushed = f.new((FLUSHED_BYTES,), "uint8", "written over the cache")
        del flushed
    del indices
    return ordering
