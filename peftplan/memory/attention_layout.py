"""How queries, keys and values lie for attention: by head or by token, shared heads repeated, what `matmul` copies first.

Queries, keys and values are (b, heads, s, d) views of projections that lie (b, s, heads, d), as transformers makes them.
Sources: torch, aten/src/ATen/native/LinearAlgebra.cpp (`matmul`); transformers, models/llama/modeling_llama.py (`repeat_kv`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftplan.arch.blocks import Attention
from peftplan.ledger import Dim
from peftplan.memory.fused_attention import number
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Tensor

if TYPE_CHECKING:
    from peftplan.memory.model import Model


def by_heads(f: Tape, q: Tensor, k: Tensor, v: Tensor, *, rotated: bool, moved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Views whose gradients come back head by head, so that the projections' gradients need a copy."""
    q = q if rotated else ops.heads(f, q, q.dims, clones=True)
    k = k if rotated or moved else ops.heads(f, k, k.dims, clones=True)
    return q, k, v if moved else ops.heads(f, v, v.dims, clones=True)


def viewed(model: Model, x: Tensor) -> Tensor:
    """A projection as heads whose gradient needs no copy: it comes back as a view, to which autograd adds nothing in place.

    DoRA alone sends two gradients to a projection; elsewhere the view needs no node.
    """
    return ops.reshaped(model.tape, x) if getattr(model.running.config, "use_dora", False) else x


def repeat_kv(f: Tape, x: Tensor, a: Attention, *, copies: bool = True) -> Tensor:
    """`repeat_kv`: a copy with every head repeated; its gradient is summed over the repetitions.

    A single head is a view, which `matmul` copies for more than one sequence.
    """
    if a.num_attention_heads == a.num_key_value_heads:
        return x
    b, _, s, d = x.dims
    dims, node = (b, a.num_attention_heads, s, d), f.record(_repeat_backward, (x,), x.dims)
    return f.new(dims, x.dtype, "repeat_kv", node) if copies else Tensor(x.storage, dims, x.dtype, node)


def _repeat_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "sum")


def spread(f: Tape, x: Tensor, heads: Dim) -> Tensor:
    """One head that serves many: `matmul` copies it for each; its gradient is summed."""
    b, _, s, d = x.dims
    return f.new((b, heads, s, d), x.dtype, "clone", f.record(_repeat_backward, (x,), x.dims))


def for_all(model: Model, x: Tensor, heads: Dim) -> Tensor:
    """What `matmul` makes of one head for many: a copy for each, of one sequence a view."""
    if model.running.batch_size > 1:
        return spread(model.tape, x, heads)
    return ops.expanded(model.tape, x, (x.dims[0], heads, *x.dims[2:]))


def batched(model: Model, x: Tensor) -> Tensor:
    """What `matmul` makes of a (b, heads, …) view that lies (b, s, heads, d): a copy, unless the batch is one."""
    return ops.copied(model.tape, x, "clone") if model.running.batch_size > 1 else x


def product(
    model: Model,
    a: Tensor,
    b: Tensor,
    dims: Dims,
    *,
    joined: tuple[bool, bool],
    spread: bool = False,
    transposed: bool = False,
) -> Tensor:
    """`matmul` of activations, which copies what does not lie head by head (`joined`: a, b do) once autocast has cast it.

    `spread`: b is a view of one head for all, of which a cast makes a tensor that lies head by head. `transposed`: as in
    `products.matmul`.
    """
    f = model.tape
    in_order = joined[1] or (spread and f.autocast not in (None, b.dtype))
    if f.autocast:
        a, b = f.cast_all(f.autocast, a, b)
    copies = a if joined[0] else batched(model, a), b if in_order else batched(model, b)
    return products.matmul(f, *copies, dims, transposed=transposed)


def gathered(model: Model, out: Tensor) -> Tensor:
    """`transpose(1, 2).contiguous()`; the gradient comes back as a view, which `matmul` copies for more than one sequence."""
    f = model.tape
    b, heads, s, d = out.dims
    clones = model.running.batch_size > 1
    node = f.record(_gathered_backward, (out,), out.dims, clones)
    return f.new((b, s, heads, d), out.dtype, "clone", node).view((b, s, joined_width(heads, d)))


def _gathered_backward(f: Tape, node: Node, saved: tuple[Dims, bool], g: Tensor) -> Tensor:
    dims, clones = saved
    return f.new(dims, g.dtype, "clone") if clones else g


def joined_width(heads: Dim, head: Dim) -> int:
    return number(heads) * number(head)
