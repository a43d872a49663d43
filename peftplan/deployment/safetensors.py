"""Bytes of a safetensors file: eight bytes of length, a JSON header with one entry per tensor, and the tensors themselves.

Source: safetensors 0.8.0, `safetensors/src/tensor.rs` (`prepare`, `Dtype`); the format's README.
"""

import json
from collections.abc import Iterable, Mapping
from math import prod
from types import MappingProxyType
from typing import NamedTuple

from peftplan.arch.modules import Shape
from peftplan.dtypes import ITEMSIZE
from peftplan.units import ceil_div

CODES: dict[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "fp8_e5m2": "F8_E5M2",
    "fp8_e4m3": "F8_E4M3",
    "int16": "I16",
    "fp16": "F16",
    "bf16": "BF16",
    "int32": "I32",
    "fp32": "F32",
    "complex64": "C64",
    "fp64": "F64",
    "int64": "I64",
}
"""Our dtypes as a header names them, in the order of the library's `Dtype`, whose last comes first in a file."""
_RANK = {dtype: rank for rank, dtype in enumerate(CODES)}

LENGTH_BYTES = 8
"""The header's length, an unsigned 64-bit number."""
ALIGNMENT = 8
"""The header is padded with spaces to a multiple of this."""
OF_TORCH: Mapping[str, str] = MappingProxyType({"format": "pt"})
"""The metadata that transformers and peft write."""


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint: its key, its dtype, its shape."""

    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor: itemsize × ∏ shape."""
        return ITEMSIZE[self.dtype] * prod(self.shape)


def header_bytes(tensors: Iterable[StoredTensor], *, metadata: Mapping[str, str] = OF_TORCH) -> int:
    """Bytes of the padded JSON header, without the eight bytes before it.

    Tensors are stored consecutively, wide dtypes first and by name within a dtype; this decides the digits of their offsets.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in sorted(tensors, key=lambda t: (-_RANK[t.dtype], t.name)):
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    written = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return ceil_div(len(written), ALIGNMENT) * ALIGNMENT


def file_bytes(tensors: Iterable[StoredTensor], *, metadata: Mapping[str, str] = OF_TORCH) -> int:
    """Bytes of the file: 8 + header + Σ tensors."""
    tensors = tuple(tensors)
    return LENGTH_BYTES + header_bytes(tensors, metadata=metadata) + sum(tensor.nbytes for tensor in tensors)
