"""What CUDA's backward of an embedding allocates beside the gradient where it sorts the indices.

Source: torch, aten/src/ATen/native/cuda/Embedding.cu (`embedding_dense_backward_cuda`: it sorts more than 3,072 indices) and
EmbeddingBackwardKernel.cu (`embedding_backward_cuda_kernel`). n indices of a table of v rows fall into at most min(n, v) segments
of equal indices, and these into at most n // 10 + min(n, v) parts, whose sums are fp32. Left out: two scalars, and what the sort
takes before the gradient is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal

from peftplan.arrays import Derived, Size, numel_at, smaller
from peftplan.ledger import Dim

MOST_UNSORTED = 3072
"""Indices up to which the kernel sorts nothing."""
ROWS_PER_THREAD = 10
"""Indices that one thread sums; a segment of more is cut into parts (`NROWS_PER_THREAD`)."""

What = Literal["indices", "segments", "parts"]
BUFFERS: tuple[What, ...] = ("indices", "indices", "indices", "segments", "segments", "parts")
"""The int64 buffers: sorted indices, their places, where segments begin; parts of each, their running sums; where parts begin."""


class SortedRows(Derived):
    """Rows of a buffer of the sort; 0 where nothing is sorted."""

    indices: tuple[Dim, ...]
    """Dims of the indices."""
    table: int
    """Rows of the table."""
    what: What

    def __new__(cls, indices: tuple[Dim, ...], table: int, what: What) -> SortedRows:
        """The size called by what it counts."""
        self = super().__new__(cls, f"{what} of {'·'.join(map(str, indices))} in {table}")
        self.indices, self.table, self.what = indices, table, what
        return self

    def __getnewargs__(self) -> tuple[tuple[Dim, ...], int, What]:  # type: ignore[override]
        """What a copy is made of."""
        return self.indices, self.table, self.what

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """The rows at these sizes, which may be arrays as well as integers."""
        return sorted_rows(self.what, n=numel_at(self.indices, sizes), v=self.table)


def sorted_rows(what: What, *, n: Size, v: int) -> Size:
    """Rows of a buffer for n indices of v rows; 0 where n indices are not sorted. n may be an array as well as an integer."""
    segments = smaller(n, v)
    rows = {"indices": n, "segments": segments, "parts": n // ROWS_PER_THREAD + segments}[what]
    sorted_where: Size = (n > MOST_UNSORTED) * rows
    return sorted_where


def sorted_dim(indices: tuple[Dim, ...], table: int, what: What) -> Dim:
    """Rows of a buffer as a dimension: a number where that of the indices is known, as that of virtual tokens is."""
    known = [dim for dim in indices if isinstance(dim, int)]
    return sorted_rows(what, n=prod(known), v=table) if len(known) == len(indices) else SortedRows(indices, table, what)
