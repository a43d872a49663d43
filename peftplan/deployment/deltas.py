"""Temporaries of peft's merge of one module: one function per method, in the order of its code.

o output width, i input width, r rank. A function gets the ledger, the weight W (o, i) and the adapter's tensors by the last part
of their names, all of which are counted elsewhere. Source: peft, `tuners/<method>/layer.py`, `merge` without `safe_merge`
and `get_delta_weight`; `tuners/lora/variants.py` for DoRA. Left out: biases; what the CPU packs for 16-bit matrix products, which
OFT and BOFT meet where the adapter itself is in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from peftplan.deployment.scratch import Array, Scratch
from peftplan.dtypes import SIXTEEN_BITS

Parts = Mapping[str, Array]
Merge = Callable[[Scratch, Array, Parts], None]

TRANSPOSING_BUFFER = 60
"""Side of the square, in elements, through which the CPU copies a transposed matrix (`copy_same_type_transpose_`, Copy.cpp)."""


def lora(s: Scratch, w: Array, parts: Parts) -> None:
    """W += B @ A · scaling."""
    delta = lora_delta(s, parts)
    s.add_in_place(w, Array(delta.dtype, w.dims))
    s.drop(delta)


def lora_delta(s: Scratch, parts: Parts) -> Array:
    """B @ A · scaling in the adapter's dtype; on the CPU 16-bit factors are multiplied in fp32."""
    a, b = _factor(parts, "A"), _factor(parts, "B")
    casts = [s.cast(x, "fp32") for x in (a, b)] if _is_slow(s, b.dtype) else []
    product = s.matmul(casts[1], casts[0]) if casts else s.matmul(b, a)
    delta = s.new(product.dtype, *product.dims)
    s.drop(product)
    return _back(s, delta, b.dtype, casts)


def dora(s: Scratch, w: Array, parts: Parts) -> None:
    """W = magnitude / |W + Δ| ⊙ (W + Δ); the copy of W made for the norm lives to the end."""
    delta = lora_delta(s, parts)
    delta = Array(delta.dtype, w.dims)
    copy = s.new(w.dtype, *w.dims)
    dora_tail(s, w, delta, _factor(parts, "magnitude_vector"))
    s.drop(copy, delta)


def dora_tail(s: Scratch, w: Array, delta: Array, magnitude: Array) -> None:
    """From Δ to the new weight, in the dtype of W: the norm of W + 1·Δ, the factor, the product, its cast."""
    outputs = prod(magnitude.dims)
    scaled = s.new(delta.dtype, *delta.dims)
    both = s.combine(w, scaled)
    s.drop(scaled)
    norm = s.new(both.dtype, outputs)
    s.drop(both)
    factor = s.combine(norm, Array(magnitude.dtype, (outputs,)))
    both = s.combine(w, delta)
    new = s.combine(both, Array(factor.dtype, (1,) * len(both.dims)))
    s.drop(both)
    if new.dtype != w.dtype:
        s.drop(s.cast(new, w.dtype))
    s.drop(new, factor, norm)


def adalora(s: Scratch, w: Array, parts: Parts) -> None:
    """W += B @ (A ⊙ E) · scaling / (ranknum + ε)."""
    a, b = parts["lora_A"], parts["lora_B"]
    scaled = s.new(a.dtype, *a.dims)
    product = s.matmul(b, scaled)
    s.drop(scaled)
    times = s.new(product.dtype, *product.dims)
    s.drop(product)
    count = s.new(parts["ranknum"].dtype, 1)
    delta = s.new(times.dtype, *times.dims)
    s.drop(times, count)
    s.add_in_place(w, Array(delta.dtype, w.dims))
    s.drop(delta)


def loha(s: Scratch, w: Array, parts: Parts) -> None:
    """W += (W1a @ W1b) ⊙ (W2a @ W2b) · scale."""
    scale = s.new("fp32", 1)
    first = s.matmul(parts["hada_w1_a"], parts["hada_w1_b"])
    second = s.matmul(parts["hada_w2_a"], parts["hada_w2_b"])
    both = s.combine(first, second)
    s.drop(first, second)
    delta = s.new(both.dtype, *both.dims)
    s.drop(both, scale)
    s.add_in_place(w, delta)
    s.drop(delta)


def lokr(s: Scratch, w: Array, parts: Parts) -> None:
    """W += (W1 ⊗ W2) · scale, each factor whole or a product of two."""
    products = [s.matmul(parts[f"{name}_a"], parts[f"{name}_b"]) for name in ("lokr_w1", "lokr_w2") if name not in parts]
    dtype = next(iter(parts.values())).dtype
    kron = s.new(dtype, *w.dims)
    delta = s.new(dtype, *w.dims)
    s.drop(kron, *products)
    s.add_in_place(w, delta)
    s.drop(delta)


def vera(s: Scratch, w: Array, parts: Parts) -> None:
    """W += (λb ⊙ B) @ (λd ⊙ A). Each module takes its corner of the shared matrices; the CPU casts 16-bit ones as a whole."""
    b, d = parts["vera_lambda_b"], parts["vera_lambda_d"]
    shared = (parts["vera_A"], parts["vera_B"], b, d)
    casts = [s.cast(x, "fp32") for x in shared] if _is_slow(s, b.dtype) else []
    dtype = "fp32" if casts else b.dtype
    left, right = s.new(dtype, b.dims[0], d.dims[0]), s.new(dtype, d.dims[0], prod(w.dims) // b.dims[0])
    product = s.matmul(left, right)
    s.drop(left, right)
    delta = _back(s, product, b.dtype, casts)
    s.add_in_place(w, Array(delta.dtype, w.dims))
    s.drop(delta)


def ia3(s: Scratch, w: Array, parts: Parts) -> None:
    """W = (W ⊙ l) in W's dtype, l along either side."""
    product = s.combine(w, Array(parts["ia3_l"].dtype, (1, 1)))
    if product.dtype != w.dtype:
        s.drop(s.cast(product, w.dtype))
    s.drop(product)


def oft(s: Scratch, w: Array, parts: Parts) -> None:
    """W = (R @ Wᵀ)ᵀ with R (i, i) built from its blocks; blocks by Cayley-Neumann, peft's default."""
    blocks = parts["oft_R"]
    i = w.dims[1]
    size = _block_size(blocks.dims[1])
    casts = [s.cast(blocks, "fp32")] if _is_slow(s, blocks.dtype) else []
    dtype = "fp32" if casts else blocks.dtype
    rotation = _rotation(s, dtype, i=i, blocks=blocks.dims[0], size=size)
    s.drop(*casts)
    rotation = _back(s, rotation, blocks.dtype, [])
    wide = s.cast(w, rotation.dtype) if w.dtype != rotation.dtype else None
    result = s.new(rotation.dtype, i, w.dims[0])
    if wide is not None:
        s.drop(wide)
    if w.dtype == result.dtype:
        _transposing(s, w.dims, w.dtype)
    s.drop(result, rotation)


def _rotation(s: Scratch, dtype: str, *, i: int, blocks: int, size: int) -> Array:
    """I + 2Q + 2Q² + … + Qᵏ over all blocks at once (`_cayley_batch`), then one matrix (i, i) with the blocks on its diagonal."""

    def stack() -> Array:
        return s.new(dtype, blocks, size, size)

    entries = stack()
    skew = stack()
    s.drop(entries)
    eye = s.new(dtype, size, size)
    sum_of_powers = stack()
    s.drop(eye)
    square = stack()
    power = stack()
    last = stack()
    s.drop(square, power, last, skew)
    rotation = s.new(dtype, i, i)
    s.drop(sum_of_powers)
    return rotation


def boft(s: Scratch, w: Array, parts: Parts) -> None:
    """W = (P·blocks·Pᵀ @ Wᵀ)ᵀ ⊙ s for one butterfly factor in fp32; the copy of W and three matrices (i, i) are the most."""
    r = parts["boft_R"]
    factors, blocks, size, _ = r.dims
    i, dtype = w.dims[1], r.dtype
    copy = s.new(w.dtype, *w.dims)
    orthogonal = s.new(dtype, factors, blocks, size, size)
    diagonal = s.new(dtype, factors, i, i)
    inner = s.new(dtype, factors, i, i)
    outer = s.new(dtype, factors, i, i)
    s.drop(diagonal, inner, orthogonal)
    wide = s.cast(w, dtype) if w.dtype != dtype else None
    rotated = s.new(dtype, i, w.dims[0])
    s.drop(copy, *([wide] if wide else ()))
    scaled = s.new(dtype, *w.dims)
    s.drop(rotated)
    straight = s.new(dtype, *w.dims)
    _transposing(s, w.dims, dtype)
    if dtype != w.dtype:
        s.drop(s.cast(straight, w.dtype))
    s.drop(straight, scaled, outer)


def fourierft(s: Scratch, w: Array, parts: Parts) -> None:
    """W += Re(ifft2(S)) · scaling: S dense in fp32, its complex copy and the transform; cuFFT's workspace is left out."""
    spectrum = parts["fourierft_spectrum"]
    places = [s.new("int64", 2, *spectrum.dims)] if s.device == "gpu" else []
    dense = s.new("fp32", *w.dims)
    as_complex, transform = s.new("complex64", *w.dims), s.new("complex64", *w.dims)
    s.drop(as_complex)
    delta = s.new("fp32", *w.dims)
    s.drop(transform)
    delta = _back(s, delta, spectrum.dtype, [])
    s.drop(dense, *places)
    s.add_in_place(w, delta)
    s.drop(delta)


def nothing(s: Scratch, w: Array, parts: Parts) -> None:
    """LN tuning swaps the trained copy in."""


def experts(s: Scratch, w: Array, parts: Parts) -> None:
    """Stacked experts: Δ of the whole parameter (E, o, i) by one einsum, · scaling, in the parameter's dtype."""
    a = _factor(parts, "A")
    product = s.new(a.dtype, *w.dims)
    delta = s.new(a.dtype, *w.dims)
    s.drop(product)
    delta = _back(s, delta, w.dtype, [])
    s.add_in_place(w, delta)
    s.drop(delta)


MERGES: dict[str, Merge] = {
    "LORA": lora,
    "ADALORA": adalora,
    "LOHA": loha,
    "LOKR": lokr,
    "VERA": vera,
    "IA3": ia3,
    "OFT": oft,
    "BOFT": boft,
    "FOURIERFT": fourierft,
    "LN_TUNING": nothing,
}
"""peft type → how one module is merged."""


def _factor(parts: Parts, which: str) -> Array:
    """`lora_A` of a linear layer, `lora_embedding_A` of an embedding."""
    return next(array for name, array in parts.items() if name in (f"lora_{which}", f"lora_embedding_{which}"))


def _is_slow(s: Scratch, dtype: str) -> bool:
    """Where peft casts to fp32 because some CPUs multiply 16-bit numbers slowly."""
    return s.device == "cpu" and dtype in SIXTEEN_BITS


def _back(s: Scratch, array: Array, dtype: str, casts: list[Array]) -> Array:
    """`.to(dtype)` where it differs, and the end of the function that held the casts."""
    if array.dtype == dtype:
        s.drop(*casts)
        return array
    cast = s.cast(array, dtype)
    s.drop(array, *casts)
    return cast


def _transposing(s: Scratch, dims: tuple[int, ...], dtype: str) -> None:
    """The CPU's buffer while it copies a transposed matrix of one dtype; small ones are copied without."""
    if s.device == "cpu" and min(dims) >= TRANSPOSING_BUFFER:
        s.drop(s.new(dtype, TRANSPOSING_BUFFER, TRANSPOSING_BUFFER))


def _block_size(entries: int) -> int:
    """b of b·(b - 1) / 2 entries above a diagonal."""
    size = 1
    while size * (size - 1) // 2 < entries:
        size += 1
    return size
