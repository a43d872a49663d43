"""Apple's cut cross entropy where a loop calls it behind the model, as NeMo Automodel's `FusedLinearCrossEntropy` does.

n tokens, h hidden size, v vocabulary. The model makes logits of the last token alone; the loss reads the head's weight, which
FSDP2 keeps gathered. No module's output leads back to the head, so FSDP2 reduces its gradient when all else is done.

Source: nemo_automodel 0.7.0, components/loss/linear_ce.py, recipes/llm/train_ft.py; cut_cross_entropy 25.6.4, `cce.py`,
`utils.py` (`_build_flat_valids`), `cce_lse_forward.py`, `indexed_dot.py`, `cce_backward.py` (`accum_e_fp32`).
"""

from __future__ import annotations

from peftplan.job.loss_sizes import LOCKED_COLUMNS, LOCKED_ROWS
from peftplan.memory.heads import logits_of
from peftplan.memory.loss import projection
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Gradients, Node, Operand, Tensor
from peftplan.units import ceil_div


def hidden_and_last(model: Model, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """No loss, the hidden states, and the logits of each row's last token."""
    rows, _, width = x.dims
    with model.tape.no_grad():
        last = logits_of(model, sliced(model.tape, x, (rows, 1, width)))
    return Tensor(None, (), "fp32"), x, last


def cut_behind_model(model: Model, x: Tensor, *further: Tensor) -> Tensor:
    """The sum over all tokens, divided by their number on all ranks. `further`: hidden states of further tokens, each of which
    has a loss of its own with the same weight."""
    f, head = model.tape, projection(model)
    weight = model.table(head.name, head)
    loss = _of_tokens(f, x, weight)
    depths = [_of_tokens(f, y, weight) for y in further]
    return ops.add(f, loss, ops.scale(f, depths[0])) if depths else loss


def _of_tokens(f: Tape, x: Tensor, weight: Operand) -> Tensor:
    hidden = ops.reshaped(f, x)
    _drop_valid_tokens(f)
    node = f.record(_backward, (hidden, weight), hidden, weight)
    log_sum = f.new(("n",), "fp32", "log-sum-exp")
    locks = f.new(("n/128",), "int32", "locks")
    del locks
    negative = f.new(("n",), "fp32", "negative dot")
    loss = f.new((), "fp32", "sum", node)
    f.keep(node, log_sum)
    del negative
    return ops.scale(f, loss, "div")


def _drop_valid_tokens(f: Tape) -> None:
    """`_build_flat_valids`: where scored tokens are, which is not kept if all are."""
    mask = f.new(("n",), "bool", "ne")
    wide = f.new(("n",), "int64", "nonzero")
    del mask
    narrow = f.new(("n",), "int32", "to")
    del wide, narrow


def _backward(f: Tape, node: Node, saved: tuple[Tensor, Operand, Tensor], g: Tensor) -> Gradients:
    """The gradient of hidden states is added up in fp32, that of the head in its own dtype."""
    hidden, weight, _ = saved
    into_hidden, into_weight = (edge is not None for edge in node.edges)
    wide = f.new(hidden.dims, "fp32", "zeros_like") if into_hidden else None
    grad_weight = f.new(weight.dims, weight.dtype, "zeros_like") if into_weight else None
    columns = ceil_div(int(hidden.dims[-1]), LOCKED_COLUMNS)
    rows = ["n/128"] * into_hidden + [ceil_div(int(weight.dims[0]), LOCKED_ROWS)] * into_weight
    locks = [f.new((of_rows, columns), "int32", "locks") for of_rows in rows]
    grad_hidden = None if wide is None else f.new(wide.dims, hidden.dtype, "to")
    del wide, locks
    return grad_hidden, grad_weight
