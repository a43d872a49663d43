"""BOFT (peft, tuners/boft/layer.py) with its CUDA extension: each forward makes the whole rotation of a layer's input.

m factors, n blocks of size k, w = n·k the input's width.
"""

from __future__ import annotations

from collections.abc import Callable

from peftplan.memory.methods.sides import sides
from peftplan.memory.parts import Part, Running
from peftplan.methods.boft import BOFTConfig
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Operand, Tensor


def boft(f: Tape, part: Part, x: Tensor, base: Callable[[Tensor], Tensor], running: Running) -> Tensor:
    """`base(x @ rotation) * scale`; rotation, scale and what they are made of live until the layer returns."""
    dtype = x.dtype
    n_in, n_out = sides(part)
    f.module = part.name
    identity = f.new((n_in, n_in), dtype, "eye")
    ones = f.new((n_out, 1), dtype, "ones")
    rotation, _kept_alive = _rotation(f, part, identity, running)
    del identity
    boft_s = part.params["boft_s"]
    scale = ops.mul(f, boft_s, ones)
    del ones
    rotation = f.to(rotation, dtype)
    rotated = _product(f, x, rotation)
    result = base(rotated)
    f.module = part.name
    bias = part.bias
    if bias is not None:
        result = ops.add(f, result, bias)
    result = ops.mul(f, result, scale.view((n_out,)))
    if bias is not None:
        result = ops.add(f, result, bias)
    return f.to(result, dtype)


def _product(f: Tape, x: Tensor, rotation: Tensor) -> Tensor:
    """`x @ rotation`."""
    return products.linear(f, x, rotation, transposed=True)


def _rotation(f: Tape, part: Part, identity: Tensor, running: Running) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The product of the factors, and what the names of the layer's forward hold besides."""
    blocks = part.params["boft_R"]
    m, n, k, _ = blocks.dims
    assert isinstance(n, int)
    assert isinstance(k, int)
    w, dtype = n * k, identity.dtype
    orthogonal = cayley(f, blocks, (m, n, k, k))
    if running.config_as(BOFTConfig).boft_dropout:
        orthogonal = _dropout(f, orthogonal, n)
    diagonal = f.new((m, w, w), orthogonal.dtype, "zeros", f.record(_blocks_backward, (orthogonal,), orthogonal))
    copies = dtype != "fp32" or running.adapter_on_host
    places = f.new((m, w, w), dtype, "boft_P") if copies else None
    diagonal = f.to(diagonal, dtype)
    every = _placed(f, diagonal, places, after=True)
    every = _placed(f, every, places, after=False)
    total = _selected(f, every)
    assert isinstance(m, int)
    for _ in range(1, m):
        total = _multiplied(f, _selected(f, every), total)
    rotation = _multiplied(f, total, identity)
    return rotation, (orthogonal, diagonal, every, total, *([places] if places is not None else ()))


def cayley(f: Tape, blocks: Operand, dims: Dims) -> Tensor:
    """`cayley_batch`: (I + S)⁻¹ (I - S) of a skew-symmetric S, in fp32."""
    node = f.record(_less_transposed_backward, (blocks,))
    less = f.new(dims, blocks.dtype, "sub", node)
    skew = ops.scale(f, less)
    del less
    return solved(f, skew, dims)


def solved(f: Tape, skew: Tensor, dims: Dims) -> Tensor:
    """`linalg.solve(I + S, I - S, left=False)` in fp32, in the dtype of S."""
    _identity = f.new((dims[-1], dims[-1]), "fp32", "eye")  # a name of peft's function
    plus = f.new(dims, "fp32", "add", f.record(_passed, (skew,)))
    minus = f.new(dims, "fp32", "sub", f.record(_negated, (skew,)))
    node = f.record(_solved_backward, (plus, minus), plus)
    pivots = f.new(dims[:-1], "int32", "pivots")
    result = f.new(dims, "fp32", "solve", node)
    lu = f.new(dims, "fp32", "LU")
    f.keep(node, lu, pivots, result.detach())
    return f.to(result, skew.dtype)


def _dropout(f: Tape, x: Tensor, n: int) -> Tensor:
    """`MultiplicativeDropoutLayer.forward`: some blocks of one factor become the identity; its draws are made on the host."""
    m, _, k, _ = x.dims
    mask = f.new((n,), "fp32", "cat")
    mask = f.new((n,), "fp32", "index")
    full = f.new((m, n, 1, 1), "fp32", "full_mask")
    identities = f.new((m, n, k, k), "fp32", "repeat")
    survivors = f.new(full.dims, "fp32", "rsub")
    left = ops.mul(f, x, survivors)
    del survivors
    replaced = ops.mul(f, identities, full)
    result = ops.add(f, left, replaced)
    del left, replaced, mask, full, identities
    return result


def _passed(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return g


def _negated(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "neg")


def _less_transposed_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    negative = f.new(g.dims, g.dtype, "neg")
    total = f.new(g.dims, g.dtype, "add")
    del negative
    return total


def _solved_backward(f: Tape, node: Node, saved: object, g: Tensor) -> tuple[Tensor, Tensor]:
    """`linalg_solve_backward`: one more system, and a product for A."""
    to_b = f.new(g.dims, g.dtype, "lu_solve")
    to_a = f.new(g.dims, g.dtype, "matmul")
    return f.new(to_a.dims, to_a.dtype, "neg"), to_b


def _blocks_backward(f: Tape, node: Node, saved: tuple[Tensor], g: Tensor) -> Tensor:
    return f.new(saved[0].dims, g.dtype, "zeros_like")


def _placed(f: Tape, x: Tensor, places: Tensor | None, *, after: bool) -> Tensor:
    """`bmm` with the permutation, which has no gradient and is kept for that of x."""
    if f.autocast:
        x = f.cast(x, f.autocast)
        places = f.new(x.dims, f.autocast, "to") if places is None or places.dtype != f.autocast else places
    node = f.record(_placed_backward, (x,), places)
    return f.new(x.dims, x.dtype, "bmm", node)


def _placed_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "bmm")


def _selected(f: Tape, every: Tensor) -> Tensor:
    """`every[i]`."""
    return Tensor(every.storage, every.dims[1:], every.dtype, f.record(_selected_backward, (every,), every.dims))


def _selected_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "select_backward")


def _multiplied(f: Tape, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices."""
    return products.matmul(f, a, b, (a.dims[0], b.dims[1]))
