"""What CUDA allocates while it sums the rows of a matrix, as for the gradient of a bias or of a norm's weight.

Where rows are many and columns few, several blocks share the columns, and their partial sums wait in a buffer: 8 bytes for each
element that is summed, up to 64 KiB for each block that the card holds (108 MiB on an A100), or half a byte for each element
where that is more.

Source: torch, aten/src/ATen/native/cuda/Reduce.cuh (`setReduceConfig`, `global_memory_size`, `semaphore_size`), where the fastest
dimension is one that is kept. Left out: sums of rows and of whole tensors, whose buffers are a few KiB, and inputs of more than
2 GiB, which are summed in parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal

from peftplan.arrays import Derived, Size, dim_at, larger, numel_at, smaller
from peftplan.hardware.processors import Processors
from peftplan.ledger import Dim

MOST_THREADS = 512
"""Threads of a block, less where each reads several columns (`MAX_NUM_THREADS`)."""
WARP = 32
VALUES_PER_THREAD = (16, 256)
"""Fewest and most rows that one thread sums; from the larger number on, blocks share columns."""

FEW: tuple[tuple[Dim, ...], ...] = (("b",),)
"""Dims of fewer rows than blocks share."""

What = Literal["partial sums", "counters"]
BUFFERS: tuple[What, ...] = ("partial sums", "counters")
"""Elements of 4 bytes, in the order in which they are allocated; freed in reverse."""


def elements(what: What, *, rows: Size, columns: int, card: Processors, matrices: Size | int = 1) -> Size:
    """Elements of a buffer of a sum over so many rows of each of the matrices; 0 where no blocks share columns. `rows` and
    `matrices` may be arrays."""
    vector = next(width for width in (4, 2, 1) if columns % width == 0)  # columns that a thread reads at once
    threads, across = MOST_THREADS // vector, columns // vector
    widest = min(1 << (across.bit_length() - 1), threads)
    height = threads // min(widest, WARP)
    width = min(widest, threads // height)
    blocks = -(-across * matrices // width)
    resident = card.number * (card.threads // (width * height))  # blocks that the card holds
    values = -(-rows // height)  # rows that a thread sums
    fewest, most = VALUES_PER_THREAD
    sharing = larger(smaller(-(-values // fewest), -(-resident // blocks)), -(-values // most))  # blocks for the same columns
    buffer = matrices * columns * width * vector * sharing if what == "partial sums" else blocks
    shared: Size = (values >= most) * (blocks <= resident) * (sharing > 1) * buffer
    return shared


class ColumnSums(Derived):
    """Elements of a buffer of such a sum."""

    rows: tuple[Dim, ...]
    """Dims that are summed."""
    columns: int
    card: Processors
    what: What

    def __new__(cls, rows: tuple[Dim, ...], columns: int, card: Processors, what: What) -> ColumnSums:
        """The size called by what it counts."""
        self = super().__new__(cls, f"{what} of {'·'.join(map(str, rows))} rows of {columns}")
        self.rows, self.columns, self.card, self.what = rows, columns, card, what
        return self

    def __getnewargs__(self) -> tuple[tuple[Dim, ...], int, Processors, What]:  # type: ignore[override]
        """What a copy is made of."""
        return self.rows, self.columns, self.card, self.what

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """The elements at these sizes, which may be arrays as well as integers."""
        return elements(self.what, rows=numel_at(self.rows, sizes), columns=self.columns, card=self.card)


class TokenSums(Derived):
    """Elements of a buffer of the sums over the tokens of each row."""

    batch: Dim
    tokens: Dim
    columns: int
    card: Processors
    what: What

    def __new__(cls, batch: Dim, tokens: Dim, columns: int, card: Processors, what: What) -> TokenSums:
        """The size called by what it counts."""
        self = super().__new__(cls, f"{what} of {tokens} tokens of {columns}, {batch}")
        self.batch, self.tokens, self.columns, self.card, self.what = batch, tokens, columns, card, what
        return self

    def __getnewargs__(self) -> tuple[Dim, Dim, int, Processors, What]:  # type: ignore[override]
        """What a copy is made of."""
        return self.batch, self.tokens, self.columns, self.card, self.what

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """The elements at these sizes, which may be arrays as well as integers."""
        rows, matrices = dim_at(self.tokens, sizes), dim_at(self.batch, sizes)
        return elements(self.what, rows=rows, columns=self.columns, card=self.card, matrices=matrices)


def column_dims(source: tuple[Dim, ...], kept: tuple[Dim, ...], card: Processors) -> tuple[Dim, ...]:
    """The buffers of a sum of a tensor over all but its last dims, as dimensions; none where this is not such a sum.

    The last dims of `source` may be spelled otherwise than those that are kept: as heads of a projection with a bias.
    """
    columns = prod(dim for dim in kept if isinstance(dim, int))
    rest, remainder = divmod(prod(dim for dim in source if isinstance(dim, int)), columns)
    named = tuple(dim for dim in source if isinstance(dim, str))
    summed: tuple[Dim, ...] = (*named, rest) if rest > 1 else named
    if columns == 1 or remainder or not source or summed in FEW or not all(isinstance(dim, int) for dim in kept):
        return ()
    if not named:
        same = source[-len(kept) :] == kept
        return tuple(elements(what, rows=rest, columns=columns, card=card) for what in BUFFERS) if same else ()
    return tuple(ColumnSums(summed, columns, card, what) for what in BUFFERS)
