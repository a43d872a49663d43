"""Slices, splits and concatenations: views whose gradients are whole tensors, and copies whose gradients are views.

Source: torch, tools/autograd/derivatives.yaml (`slice`, `split`, `cat`) and FunctionsManual.cpp (`split_backward`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peftplan.tape import ops
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor


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
