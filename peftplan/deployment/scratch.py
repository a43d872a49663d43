"""A ledger of temporaries: tensors are allocated and freed in the order of a library's code, and the highest total is kept.

On the GPU each tensor takes its bytes rounded up to 512, and an operation reads operands of another dtype as they are. On the CPU
a tensor takes its own bytes, and an operation on mixed dtypes first makes copies in the common one, of its operands and, if in
place, of its output (torch, `aten/src/ATen/TensorIterator.cpp`, `compute_types`). Left out: Python's numbers, 8 bytes there.
"""

from math import prod
from typing import Literal, NamedTuple

from peftplan.dtypes import ITEMSIZE, SIXTEEN_BITS
from peftplan.units import round512

Device = Literal["cpu", "gpu"]
WIDTH = {"int8": 0, "bf16": 1, "fp16": 1, "fp32": 2, "complex64": 3}
"""torch's promotion: the wider one of two dtypes, fp32 for bf16 with fp16."""


class Array(NamedTuple):
    """A tensor by its dtype and dims; the ledger decides whether it is counted."""

    dtype: str
    dims: tuple[int, ...]


class Scratch:
    """Bytes alive now, and the most so far."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.alive = 0
        self.peak = 0

    def bytes(self, array: Array) -> int:
        """What one tensor takes."""
        nbytes = ITEMSIZE[array.dtype] * prod(array.dims)
        return round512(nbytes) if self.device == "gpu" else nbytes

    def new(self, dtype: str, *dims: int) -> Array:
        """Allocate a tensor."""
        array = Array(dtype, dims)
        self.alive += self.bytes(array)
        self.peak = max(self.peak, self.alive)
        return array

    def drop(self, *arrays: Array) -> None:
        """Free tensors."""
        self.alive -= sum(self.bytes(array) for array in arrays)

    def cast(self, array: Array, dtype: str) -> Array:
        """`.to(dtype)`: a copy, also where the caller checks first that the dtype differs."""
        return self.new(dtype, *array.dims)

    def matmul(self, left: Array, right: Array) -> Array:
        """left @ right, both of one dtype."""
        return self.new(left.dtype, left.dims[0], right.dims[1])

    def combine(self, a: Array, b: Array) -> Array:
        """An elementwise operation of two tensors that broadcast."""
        common = promote(a.dtype, b.dtype)
        copies = self._copies(common, a, b)
        dims = tuple(max(pair) for pair in zip(a.dims, b.dims, strict=True))
        result = self.new(common, *dims)
        self.drop(*copies)
        return result

    def add_in_place(self, target: Array, other: Array) -> None:
        """target += other: what it needs beside both."""
        common = promote(target.dtype, other.dtype)
        output = self._copies(common, target)
        self.drop(*self._copies(common, target, other), *output)

    def _copies(self, common: str, *arrays: Array) -> list[Array]:
        return [self.cast(a, common) for a in arrays if a.dtype != common] if self.device == "cpu" else []


def promote(a: str, b: str) -> str:
    """torch's result type of two tensors."""
    if {a, b} == set(SIXTEEN_BITS):
        return "fp32"
    return max(a, b, key=lambda dtype: WIDTH[dtype])
