"""Losses of distillation: the generalized Jensen-Shannon divergence of all logits of student and teacher, or of those of scored
tokens part by part, and divergences of tiles of logits.

b rows, s tokens, v vocabulary, n scored tokens. Source: trl `GKDTrainer.generalized_jsd_loss`;
ms-swift 4.6.0, rlhf_trainers/gkd_loss.py (`gkd_loss`, `jsd_loss`); aten ReduceOps.cpp (`logsumexp_out_impl`), Loss.cpp
(`kl_div`); autograd's `logsumexp_backward`;
`DistillationTrainer._compute_loss`, kernels/chunked_divergence.py, whose Triton kernels take nothing.
"""

from __future__ import annotations

from peftplan.job.loss_sizes import VOCAB_TILE
from peftplan.memory.chunked_loss import rows_of
from peftplan.memory.loss import chunks, projection
from peftplan.memory.model import Model
from peftplan.tape import ops
from peftplan.tape.shaping import sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor


def divergence(f: Tape, student: Tensor, teacher: Tensor, *, beta: float | None) -> Tensor:
    """The divergence of the next tokens, over those that are scored. `student`, `teacher`: logits, which the caller holds.
    `beta`: 0 for that from the student, 1 for that from the teacher; between them both are from a mixture.

    Locals of a Python function live until it returns. At the peak the two divergences from the mixture are added up: 15 tensors
    of b x (s - 1) x v are alive, the mixture's stacked input counted twice, beside both models' logits.
    """
    rows, seq, vocab = student.dims
    dims: Dims = (rows, f"{seq}-1", vocab)
    mask = f.new(dims[:2], "bool", "ne")
    mine = ops.scale(f, sliced(f, student, dims), "div")
    theirs = f.new(dims, "fp32", "div")
    log_mine = ops.keeps_output(f, mine, "log_softmax")
    log_theirs = f.new(dims, "fp32", "log_softmax")
    if beta in (0, 1):
        total = _divergence_of_teacher(f, log_mine) if beta == 0 else _divergence_of_student(f, log_mine, log_theirs)
        locals_of_mixture: tuple[Tensor, ...] = ()
    else:
        mixture = _mixed(f, log_mine, dims)
        from_teacher = _divergence_of_teacher(f, mixture)
        from_student = _divergence_of_student(f, log_mine, mixture)
        locals_of_mixture = (mixture, from_teacher, from_student)
        weighed = ops.scale(f, from_teacher)
        other = ops.scale(f, from_student)
        del mixture, from_teacher, from_student
        total = ops.add(f, weighed, other)
        del weighed, other
    scored = rows_of(f, total, mask)
    del mine, theirs, log_mine, log_theirs, locals_of_mixture, total
    return ops.scale(f, ops.summed(f, scored), "div")


def divergence_in_parts(f: Tape, student: Tensor, teacher: Tensor, *, at_once: int, parts: int) -> Tensor:
    """`gkd_loss` of scored tokens: their logits, and those divided by the temperature, live until it returns. `parts`: how many
    there are of `at_once` tokens, the last one of the rest. The caller holds the logits of all positions.
    """
    labels = [f.new(student.dims[:2], "int64", "roll") for _ in range(2)]
    masks = [f.new(student.dims[:2], "bool", "ne") for _ in range(2)]
    scored = rows_of(f, student, masks[0])
    of_teacher = rows_of(f, teacher, masks[1])
    selected = rows_of(f, labels[1], masks[1])
    divided = ops.scale(f, scored, "div")
    divided_teacher = f.new(scored.dims, teacher.dtype, "div")
    del selected
    total = None
    for number in range(parts):
        dims: Dims = (at_once if number < parts - 1 else "rest", scored.dims[-1])
        log_mine = ops.keeps_output(f, sliced(f, divided, dims), "log_softmax")
        log_theirs = f.new(dims, teacher.dtype, "log_softmax")
        mixture = _mixed(f, log_mine, dims)
        of_rows = [ops.summed(f, _divergence_of_teacher(f, mixture), dims[:1])]
        of_rows.append(ops.summed(f, _divergence_of_student(f, log_mine, mixture), dims[:1]))
        part = ops.summed(f, ops.add(f, *(ops.scale(f, of_model) for of_model in of_rows)))
        total = part if total is None else ops.add(f, total, part)
    assert total is not None
    del labels, masks, scored, of_teacher, divided, divided_teacher, log_mine, log_theirs, mixture
    return ops.scale(f, total, "div")


def _mixed(f: Tape, log_mine: Tensor, dims: Dims) -> Tensor:
    """`logsumexp(stack([log p + log(1 - beta), log q + log(beta)]))`."""
    dtype = log_mine.dtype
    parts = [ops.shift(f, log_mine), f.new(dims, dtype, "add")]
    both = f.new((2, *dims), dtype, "stack", f.record(_stacked_backward, (parts[0],)))
    parts.clear()
    maxima = f.new(dims, dtype, "amax")
    node = f.record(_logsumexp_backward, (both,), both.detach())
    exponentials = f.new((2, *dims), dtype, "sub")
    mixture = f.new(dims, dtype, "logsumexp", node)
    f.keep(node, mixture.detach())
    del exponentials, maxima
    return mixture


def _stacked_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return Tensor(g.storage, g.dims[1:], g.dtype)  # a view


def _logsumexp_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor], g: Tensor) -> Tensor:
    parts = [f.new(saved[0].dims, saved[0].dtype, name) for name in ("sub", "exp", "mul")]
    return parts[-1]


def _divergence_of_teacher(f: Tape, mixture: Tensor) -> Tensor:
    """`exp(target) * (target - input)`, whose target needs no gradient."""
    probabilities = f.new(mixture.dims, mixture.dtype, "exp")
    difference = f.new(mixture.dims, mixture.dtype, "sub", f.record(_negated_backward, (mixture,)))
    return ops.mul(f, probabilities, difference)


def _divergence_of_student(f: Tape, log_mine: Tensor, mixture: Tensor) -> Tensor:
    """The same with a target that needs one."""
    probabilities = ops.keeps_output(f, log_mine, "exp")
    difference = f.new(mixture.dims, mixture.dtype, "sub", f.record(_difference_backward, (log_mine, mixture)))
    return ops.mul(f, probabilities, difference)


def _negated_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "neg")


def _difference_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Gradients:
    return g, None if node.edges[1] is None else f.new(g.dims, g.dtype, "neg")


STATISTICS = 9
"""Running maxima and sums of both models, and the divergences from the mixture, one number a token each."""


def hidden_states(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """The backbone's output alone, in place of a head."""
    return Tensor(None, (), "fp32"), x


def divergence_in_tiles(student: Model, teacher: Model, mine: Tensor, theirs: Tensor) -> Tensor:
    """`_chunked_divergence_loss`: completions alone are projected, tile by tile. The caller holds the hidden states."""
    f, head, other = student.tape, projection(student), projection(teacher)
    mask = f.new(("n",), "bool", "ne")
    chosen = [rows_of(f, _of_completions(f, x), mask) for x in (mine, theirs)]
    node = f.record(_tiles_backward, (chosen[0], head.own_weight))
    numbers = f.many(("n",), "fp32", "statistics", STATISTICS)
    buffers = [_tile(f) for _ in range(2)]
    f.products.append((len(f.log), "cuBLAS"))
    f.keep(
        node,
        chosen[0].detach(),
        head.own_weight,
        chosen[1],
        other.own_weight,
        f.many(("n",), "fp32", "log z", 3),
        chunks(student),
    )
    per_token = f.new(("n",), "fp32", "divergence", node)
    del buffers, numbers, chosen
    return ops.scale(f, ops.summed(f, per_token), "div")


def _of_completions(f: Tape, x: Tensor) -> Tensor:
    """`hidden[:, :-1][:, -K:].reshape(-1, H)`: a copy, where there are several rows."""
    rows, seq, width = x.dims
    view = sliced(f, sliced(f, x, (rows, f"{seq}-1", width)), ("n", width))
    return ops.copied(f, view, "reshape", viewed=False) if f.several else view


def _tile(f: Tape) -> Tensor:
    buffer = f.new(("rows", VOCAB_TILE), "fp32", "logits, in tiles")
    f.category[buffer.storage.number] = "logits"  # type: ignore[union-attr]
    return buffer


def _tiles_backward(f: Tape, node: Node, saved: tuple[Tensor, Operand, object, object, object, object], g: Tensor) -> Gradients:
    """Tiles are projected again, and the student's gradients added up in fp32."""
    hidden, weight, *_ = saved
    wide = [f.new(x.dims, "fp32", "zeros") if edge else None for x, edge in zip((hidden, weight), node.edges, strict=True)]
    buffers = [_tile(f) for _ in range(2)]
    f.products.append((len(f.log), "cuBLAS"))
    narrow = f.new(("rows", VOCAB_TILE), hidden.dtype, "to") if hidden.dtype != "fp32" else None
    del narrow, buffers
    return tuple(None if w is None else f.to(w, x.dtype) for w, x in zip(wide, (hidden, weight), strict=True))
