"""OFT (peft, tuners/oft/layer.py): the input is rotated block by block, by matrices that each forward makes anew.

n blocks of size k. `module_dropout` is a module that no forward of peft's calls.
"""

from __future__ import annotations

from collections.abc import Callable

from peftplan.errors import RefusedError
from peftplan.memory.methods.boft import solved
from peftplan.memory.methods.sides import sides
from peftplan.memory.parts import Part, Running
from peftplan.methods.oft import OFTConfig
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Node, Operand, Tensor
from peftplan.versions import named

PICTURE = 4
"""Dims of an input that peft unfolds as a convolution does; latents of `kv_b_proj` have as many."""


def oft(f: Tape, part: Part, x: Tensor, base: Callable[[Tensor], Tensor], running: Running) -> Tensor:
    """`base(rotated x)`: the rotated x lives in the adapter's dtype until the layer returns."""
    config, dtype = running.config_as(OFTConfig), x.dtype
    n_in, _ = sides(part)
    f.module = f"{part.name}.oft_R"
    x = _rotated(f, f.to(x, part.params["oft_R.weight"].dtype), part.params["oft_R.weight"], n_in, config)
    f.module = part.name
    result = base(f.to(x, dtype))
    return f.to(result, dtype)


def _rotated(f: Tape, x: Tensor, weight: Operand, n_in: int, config: OFTConfig) -> Tensor:
    """`OFTRotationModule.forward`: `einsum` is a product by blocks, whose result is copied token by token."""
    count, entries = weight.dims
    k = next(k for k in range(1, n_in + 1) if k * (k - 1) // 2 == entries and (k > 1 or count == n_in))
    if config.coft:
        with f.no_grad():
            _project(f, weight, (count, k, k))
    rotation = _cayley(f, weight, (count, k, k), config)
    blocks = n_in // k
    if config.block_share:
        node = f.record(_repeated_backward, (rotation,), rotation.dims)
        rotation = f.new((blocks, k, k), rotation.dtype, "repeat", node)
    if len(x.dims) == PICTURE:
        raise RefusedError(
            f"{named('peft')} refuses it: OFT takes an input of 4 dims for a picture: RuntimeError: shape is invalid"
        )
    by_block = (blocks, *x.dims[:-1], k)
    product = products.matmul(f, x.view(by_block), rotation, by_block)
    rotated = ops.copied(f, product, "clone", x.dims) if blocks > 1 else product.view(x.dims)
    return f.to(rotated, x.dtype)


def _repeated_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "sum")


def _project(f: Tape, weight: Operand, dims: Dims) -> None:
    """`_project_batch`, copied into the weight: rotations that went too far from zero are drawn back."""
    skew = _skew(f, weight, dims)
    zeros = f.new(dims[1:], weight.dtype, "zeros")
    difference = f.new(dims, weight.dtype, "sub")
    again = f.new(dims, weight.dtype, "sub")
    norm = f.new((dims[0], 1, 1), weight.dtype, "norm")
    del again
    near = f.new(norm.dims, "bool", "le")
    quotient = f.new(dims, weight.dtype, "div")
    scaled = f.new(dims, weight.dtype, "mul")
    del quotient
    moved = f.new(dims, weight.dtype, "add")
    del scaled
    out = f.new(dims, weight.dtype, "where")
    del moved
    f.new(weight.dims, weight.dtype, "index")
    del out, near, norm, difference, zeros, skew


def _cayley(f: Tape, weight: Operand, dims: Dims, config: OFTConfig) -> Tensor:
    """`_cayley_batch`: exact, or the first terms of its series."""
    q = _skew(f, weight, dims)
    return _neumann(f, q, config.num_cayley_neumann_terms) if config.use_cayley_neumann else solved(f, q, dims)


def _neumann(f: Tape, q: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q² + … + Qⁿ, of a skew-symmetric Q."""
    dims = q.dims
    identity = f.new(dims[1:], q.dtype, "eye")
    total = f.new(dims, q.dtype, "repeat")
    del identity
    if terms == 1:
        return total
    total = _added(f, total, q, scales=True)
    power = q
    for number in range(2, terms):
        power = products.matmul(f, power, q, dims)
        total = _added(f, total, power, scales=number < terms - 1 or terms == 3)
    return total


def _skew(f: Tape, weight: Operand, dims: Dims) -> Tensor:
    """`_pytorch_skew_symmetric`: the weight put above the diagonal, less its transpose."""
    upper = f.new(dims, weight.dtype, "zeros", f.record(_upper_backward, (weight,), weight.dims))
    return f.new(dims, weight.dtype, "sub", f.record(_less_transposed_backward, (upper,)))


def _upper_backward(f: Tape, node: Node, saved: tuple[Dims], g: Tensor) -> Tensor:
    return f.new(saved[0], g.dtype, "index")


def _less_transposed_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    negative = f.new(g.dims, g.dtype, "neg")
    total = f.new(g.dims, g.dtype, "add")
    del negative
    return total


def _added(f: Tape, total: Tensor, power: Tensor, *, scales: bool) -> Tensor:
    """`total.add_(power, alpha)`."""
    node = f.record(_added_backward, (total, power), scales)
    return Tensor(total.storage, total.dims, total.dtype, node)


def _added_backward(f: Tape, node: Node, saved: tuple[bool], g: Tensor) -> tuple[Tensor, Tensor]:
    return g, f.new(g.dims, g.dtype, "mul") if saved[0] else g
