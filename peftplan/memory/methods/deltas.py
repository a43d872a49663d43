"""Methods that make the whole update ΔW in each forward: LoHa, LoKr, FourierFT.

Source: peft, tuners/{loha,lokr,fourierft}/layer.py. ΔW is as large as the layer's weight, in the adapter's dtype; `linear`
keeps it where the layer's input has a gradient. Left out: `module_dropout`, which skips adapters at random.
"""

from __future__ import annotations

from collections.abc import Callable

from peftplan.memory.methods.sides import sides
from peftplan.memory.parts import Part, Running
from peftplan.methods.loha import LoHaConfig
from peftplan.methods.lokr import LoKrConfig
from peftplan.tape import ops, products
from peftplan.tape.tape import Tape
from peftplan.tape.tensors import Dims, Gradients, Node, Operand, Tensor

Base = Callable[[Tensor], Tensor]


def loha(f: Tape, part: Part, x: Tensor, base: Base, running: Running) -> Tensor:
    """`result + ΔW x`, with ΔW = (W1a W1b) ∘ (W2a W2b)."""
    return _added(f, part, x, base, _hadamard, drops=running.config_as(LoHaConfig).rank_dropout > 0)


def lokr(f: Tape, part: Part, x: Tensor, base: Base, running: Running) -> Tensor:
    """`result + ΔW x`, with ΔW = W1 ⊗ W2, either factor whole or a product."""
    return _added(f, part, x, base, _kronecker, drops=running.config_as(LoKrConfig).rank_dropout > 0, is_view=True)


def _added(
    f: Tape, part: Part, x: Tensor, base: Base, delta: Callable[[Tape, Part], Tensor], *, drops: bool, is_view: bool = False
) -> Tensor:
    dtype = x.dtype
    result = base(x)
    f.module = part.name
    out = _applied(f, _dropped(f, delta(f, part), is_view=is_view) if drops else delta(f, part), x)
    total = ops.add(f, result, out)
    del out, result  # as `result = result + …` frees them
    return f.to(total, dtype)


def _dropped(f: Tape, weight: Tensor, *, is_view: bool) -> Tensor:
    """`rank_dropout`: `weight *= drop`, which keeps one number per row; a view's gradient is copied twice (`CopySlices`)."""
    drop = f.new((weight.dims[0], 1), weight.dtype, "rank_dropout")
    backward = _dropped_view_backward if is_view else _dropped_backward
    return Tensor(weight.storage, weight.dims, weight.dtype, f.record(backward, (weight,), drop))


def _dropped_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, g.dtype, "mul")


def _dropped_view_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    out = f.new(g.dims, g.dtype, "CopySlices")
    temporaries = f.new(g.dims, g.dtype, "clone"), f.new(g.dims, g.dtype, "mul")
    del temporaries
    return out


def _applied(f: Tape, weight: Tensor, x: Tensor) -> Tensor:
    """`linear` of x in the dtype of ΔW; that copy lives until the product is there, longer where something keeps it."""
    x = f.to(x, weight.dtype)
    return products.linear(f, x, weight)


def _hadamard(f: Tape, part: Part) -> Tensor:
    """`HadaWeight`: keeps the four factors; the products are made again in backward, where no autocast runs."""
    factors = tuple(part.params[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    n_in, n_out = sides(part)
    node = f.record(_hadamard_backward, factors, *(p.dims for p in factors), factors[0].dtype)
    dtype = factors[0].dtype
    if f.autocast:
        dtype = [f.cast(p, f.autocast) for p in factors].pop().dtype  # each is cast
    first, second = (f.new((n_out, n_in), dtype, "mm") for _ in "12")
    product = f.new((n_out, n_in), dtype, "mul")
    del first, second
    return f.new((n_out, n_in), product.dtype, "mul", node)


def _hadamard_backward(f: Tape, node: Node, saved: tuple[Dims, Dims, Dims, Dims, str], g: Tensor) -> Gradients:
    *dims, dtype = saved
    scaled = f.new(g.dims, g.dtype, "mul")
    grads = []
    temporary: Tensor | None = None
    for left, right in (dims[:2], dims[2:]):
        other = f.new(g.dims, dtype, "mm")
        temporary = f.new(g.dims, ops.promoted(scaled.dtype, dtype), "mul")
        del other
        grads += [f.new(left, dtype, "mm"), f.new(right, dtype, "mm")]
    del temporary, scaled
    return grads


def _kronecker(f: Tape, part: Part) -> Tensor:
    """`kron(W1, W2) * scaling`: a product keeps both factors."""
    n_in, n_out = sides(part)
    one, two = _factor(f, part, "lokr_w1"), _factor(f, part, "lokr_w2")
    dtype = ops.promoted(one.dtype, two.dtype)
    dims = (one.dims[0], two.dims[0], one.dims[1], two.dims[1])
    product = f.new(dims, dtype, "mul", f.record(_kron_backward, (one, two), one, two))
    return ops.scale(f, product.view((n_out, n_in)))


def _factor(f: Tape, part: Part, name: str) -> Operand:
    whole = part.params.get(name)
    if whole is not None:
        return whole
    a, b = part.params[f"{name}_a"], part.params[f"{name}_b"]
    return products.matmul(f, a, b, (a.dims[0], b.dims[1]))  # type: ignore[arg-type]


def _kron_backward(f: Tape, node: Node, saved: tuple[Operand, Operand], g: Tensor) -> Gradients:
    one, two = saved
    by_two, by_one = (f.new(g.dims, g.dtype, "mul") for _ in "12")  # `MulBackward0` begins with `other`
    grad_one = f.new(one.dims, g.dtype, "sum")
    del by_one
    grad_two = f.column_sum((one.dims[0], one.dims[1], *two.dims), two.dims, g.dtype)
    del by_two
    return grad_one, grad_two


def fourierft(f: Tape, part: Part, x: Tensor, base: Base, running: Running) -> Tensor:
    """`result + ΔW x`, with ΔW the real part of a spectrum's inverse Fourier transform; ΔW lives until the call returns."""
    dtype = x.dtype
    result = base(x)
    f.module = part.name
    delta = _transformed(f, part)
    x = f.to(x, delta.dtype)
    result = ops.add(f, result, products.linear(f, x, delta))
    narrow: Tensor = f.to(result, dtype)
    del delta
    return narrow


def _transformed(f: Tape, part: Part) -> Tensor:
    """Keeps the places of the coefficients, which lie on the host and are copied each time."""
    spectrum = part.params["fourierft_spectrum"]
    n_in, n_out = sides(part)
    dims: Dims = (n_out, n_in)
    places = f.new((2, spectrum.dims[0]), "int64", "indices")
    dense = f.new(dims, "fp32", "zeros", f.record(_placed_backward, (spectrum,), places, spectrum.dims))
    wide = f.new(dims, "complex64", "to")
    transformed = f.new(dims, "complex64", "fft", f.record(_fft_backward, (dense,)))
    del wide
    real = Tensor(transformed.storage, dims, "fp32", f.record(_real_backward, (transformed,)))
    delta = ops.scale(f, real)
    del transformed, real
    narrow: Tensor = f.to(delta, spectrum.dtype)
    del dense, delta
    return narrow


def _placed_backward(f: Tape, node: Node, saved: tuple[Tensor, Dims], g: Tensor) -> Tensor:
    return f.new(saved[1], g.dtype, "index")


def _fft_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    """Transformed back; its real part is a view."""
    return Tensor(f.new(g.dims, "complex64", "fft").storage, g.dims, "fp32")


def _real_backward(f: Tape, node: Node, saved: object, g: Tensor) -> Tensor:
    return f.new(g.dims, "complex64", "select_backward")
