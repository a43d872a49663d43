"""Rotary embedding as transformers writes it: of whole heads, of their first numbers, and in fp32.

Source: transformers, models/*/modeling_*.py (`apply_rotary_pos_emb`, `rotate_half`).
"""

from __future__ import annotations

from collections.abc import Callable

from peftplan.ledger import Dim
from peftplan.tape import ops
from peftplan.tape.shaping import cat, sliced
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Tensor

Rotate = Callable[[Tape, Tensor, Tensor, Tensor], Tensor]


def rotary(f: Tape, x: Tensor, cos: Tensor, sin: Tensor, *, widens: bool = False) -> Tensor:
    """`x * cos + rotate_half(x) * sin`: saves cos and sin alone. Source: transformers, `apply_rotary_pos_emb`.

    `widens`: factors of wider tables are cast before they are multiplied (`x.float() * cos + rotate_half(x).float() * sin`).
    """
    dtype = ops.promoted(x.dtype, cos.dtype)
    widens = widens and x.dtype != dtype
    half = (*x.dims[:-1], _half(x.dims[-1]))
    wide = f.new(x.dims, dtype, "to") if widens else None
    by_cos = f.new(x.dims, dtype, "mul")
    del wide
    negated = f.new(half, x.dtype, "neg")
    turned = f.new(x.dims, x.dtype, "cat")
    del negated
    if widens:
        turned = f.new(x.dims, dtype, "to")
    by_sin = f.new(x.dims, dtype, "mul")
    del turned
    out = f.new(x.dims, dtype, "add", f.record(_rotary_backward, (x,), cos, sin, x.dtype))
    del by_cos, by_sin
    return out


def _rotary_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor, str], g: Tensor) -> Tensor:
    dims, dtype = g.dims, saved[2]
    turned = f.new(dims, g.dtype, "mul")
    if dtype != g.dtype:
        turned = f.new(dims, dtype, "to")
    negated = f.new((*dims[:-1], _half(dims[-1])), dtype, "neg")
    out = f.new(dims, dtype, "slice_backward")
    del negated
    second = f.new(dims, dtype, "slice_backward")  # added in place into the first, like the third
    del turned, second
    by_cos = f.new(dims, g.dtype, "mul")
    del g
    if by_cos.dtype != dtype:
        by_cos = f.new(dims, dtype, "to")
    del by_cos
    return out


def rotary_in_fp32(f: Tape, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x.float() * cos + rotate_half(x.float()) * sin`, in fp32. Source: transformers, modeling_modernbert.py."""
    half = (*x.dims[:-1], _half(x.dims[-1]))
    narrow = x.dtype != "fp32"
    wide = f.new(x.dims, "fp32", "to") if narrow else None
    by_cos = f.new(x.dims, "fp32", "mul")
    del wide
    wide = f.new(x.dims, "fp32", "to") if narrow else None
    negated = f.new(half, "fp32", "neg")
    turned = f.new(x.dims, "fp32", "cat")
    del negated, wide
    by_sin = f.new(x.dims, "fp32", "mul")
    del turned
    out = f.new(x.dims, "fp32", "add", f.record(_rotary_in_fp32_backward, (x,), cos, sin, x.dtype))
    del by_cos, by_sin
    return out


def _rotary_in_fp32_backward(f: Tape, node: Node, saved: tuple[Tensor, Tensor, str], g: Tensor) -> Tensor:
    dims, dtype = g.dims, saved[2]
    turned = f.new(dims, "fp32", "mul")
    negated = f.new((*dims[:-1], _half(dims[-1])), "fp32", "neg")
    both = f.new(dims, "fp32", "slice_backward")
    del negated
    second = f.new(dims, "fp32", "slice_backward")  # added in place into the first
    del turned, second
    out: Tensor = f.to(both, dtype)
    del both
    by_cos = f.to(f.new(dims, "fp32", "mul"), dtype)  # added in place into the sum
    del by_cos
    return out


def _half(dim: Dim) -> int:
    assert isinstance(dim, int)
    return dim // 2


def partly_rotary(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotate: Rotate = rotary) -> tuple[Tensor, Tensor]:
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
    joined = cat(f, (rotary(f, q_rot, cos, sin), q_pass), q.dims)
    return joined, cat(f, (rotary(f, k_rot, cos, sin), k_pass), k.dims)


def partly_rotary_inline(f: Tape, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As `partly_rotary`, written out in a model's `forward`.

    Returns the parts too: they are locals of that `forward` and live until it returns.
    """
    q_rot, q_pass = _parts(f, q, cos)
    k_rot, k_pass = _parts(f, k, cos)
    q_rot, k_rot = rotary(f, q_rot, cos, sin), rotary(f, k_rot, cos, sin)
    q = cat(f, (q_rot, q_pass), q.dims)
    return q, cat(f, (k_rot, k_pass), k.dims), q_rot, q_pass, k_rot, k_pass


def halves_rotated(f: Tape, first: Tensor, second: Tensor, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
    """`cat((first * cos - second * sin, second * cos + first * sin))`: cos and sin are as wide as one half of a head."""
    by_cos, by_sin = ops.mul(f, first, cos), ops.mul(f, second, sin)
    one = _difference(f, by_cos, by_sin)
    del by_cos, by_sin
    by_cos, by_sin = ops.mul(f, second, cos), ops.mul(f, first, sin)
    other = ops.add(f, by_cos, by_sin)
    del by_cos, by_sin
    return cat(f, (one, other), dims)


def _difference(f: Tape, a: Tensor, b: Tensor) -> Tensor:
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
