"""Slices, splits and concatenations: views whose gradients are whole tensors, and copies whose gradients are views.

Source: torch, tools/autograd/derivatives.yaml (`slice`, `split`, `cat`) and FunctionsManual.cpp (`split_backward`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor

Rotate = Callable[[Tape, Tensor, Tensor, Tensor], Tensor]


def sliced(f: Tape, x: Tensor, dims: Dims) -> Tensor:
    """`x[..., i:j]`: shares the storage of x. The gradient of x is allocated whole (`slice_backward`)."""
    return Tensor(x.storage, dims, x.dtype, f.record(_sliced_backward, (x,), x.dims))


def _sliced_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "slice_backward")


def split(f: Tape, x: Tensor, parts: Iterable[Dims]) -> tuple[Tensor, ...]:
    """`split`, `chunk`: views of x with these dims. Backward concatenates their gradients into one new tensor."""
    node = f.record(_split_backward, (x,), x.dims)
    return tuple(Tensor(x.storage, dims, x.dtype, node, number) for number, dims in enumerate(parts))


def _split_backward(f: Tape, node: Node, saved: tuple[Dims], *grads: Tensor | None) -> Tensor:
    first = next(g for g in grads if g is not None)
    return f.new(saved[0], first.dtype, "cat")


def cat(f: Tape, parts: Sequence[Tensor], dims: Dims) -> Tensor:
    """`cat`: copies all parts into a tensor of `dims`. The gradients of the parts are views of its gradient.

    The dtype is the promoted one of all parts, with autocast and without.
    """
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = ops.promoted(dtype, part.dtype)
    return f.new(dims, dtype, "cat", f.record(_cat_backward, tuple(parts), *(part.dims for part in parts)))


def _cat_backward(f: Tape, node: Node, saved: tuple[Dims, ...], g: Tensor) -> Gradients:
    return tuple(Tensor(g.storage, dims, g.dtype) for dims in saved)


def partly_rotary(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotate: Rotate = ops.rotary) -> tuple[Tensor, Tensor]:
    """Rotate the first `cos.dims[-1]` numbers of each head and concatenate them with the rest, which has no rotary position."""
    q_rot, q_pass = _parts(f, q, cos)
    k_rot, k_pass = _parts(f, k, cos)
    q_rot, k_rot = rotate(f, q_rot, cos, sin), rotate(f, k_rot, cos, sin)
    q_rot = cat(f, (q_rot, q_pass), q.dims)
    return q_rot, cat(f, (k_rot, k_pass), k.dims)


def partly_rotary_in_turn(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `partly_rotary`, but concatenates the queries before it rotates the keys."""
    q_rot, q_pass = _parts(f, q, cos)
    k_rot, k_pass = _parts(f, k, cos)
    joined = cat(f, (ops.rotary(f, q_rot, cos, sin), q_pass), q.dims)
    return joined, cat(f, (ops.rotary(f, k_rot, cos, sin), k_pass), k.dims)


def partly_rotary_inline(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As `partly_rotary`, written out in a model's `forward`.

    Returns the parts too: they are locals of that `forward` and live until it returns.
    """
    q_rot, q_pass = _parts(f, q, cos)
    k_rot, k_pass = _parts(f, k, cos)
    q_rot, k_rot = ops.rotary(f, q_rot, cos, sin), ops.rotary(f, k_rot, cos, sin)
    q = cat(f, (q_rot, q_pass), q.dims)
    return q, cat(f, (k_rot, k_pass), k.dims), q_rot, q_pass, k_rot, k_pass


def halves_rotated(f: Tape, first: Tensor, second: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
    """`cat((first * cos - second * sin, second * cos + first * sin))`: cos and sin are as wide as one half of a head."""
    by_cos, by_sin = ops.mul(f, first, cos), ops.mul(f, second, sin)
    one = difference(f, by_cos, by_sin)
    del by_cos, by_sin
    by_cos, by_sin = ops.mul(f, second, cos), ops.mul(f, first, sin)
    other = ops.add(f, by_cos, by_sin)
    del by_cos, by_sin
    return cat(f, (one, other), dims)


def difference(f: Tape, a: Tensor, b: Tensor) -> Tensor:
    """`a - b`: saves nothing."""
    return f.new(a.dims, ops.promoted(a.dtype, b.dtype), "sub", f.record(_difference_backward, (a, b)))


def _difference_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Gradients:
    return g, f.new(g.dims, g.dtype, "neg") if node.edges[1] else None


def _parts(f: Tape, x: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    """The rotated part and the rest of each head. If all of it is rotated, the first is an alias of x, as indexing returns it.

    In backward the gradient of the rest, made whole, is thus there before that of the alias, which is added to it.
    """
    *before, head = x.dims
    rotated = cos.dims[-1]
    assert isinstance(head, int)
    assert isinstance(rotated, int)
    rot = _alias(f, x) if rotated == head else sliced(f, x, (*before, rotated))
    return rot, sliced(f, x, (*before, head - rotated))


def _alias(f: Tape, x: Tensor) -> Tensor:
    return Tensor(x.storage, x.dims, x.dtype, f.record(_alias_backward, (x,)))


def _alias_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return g
