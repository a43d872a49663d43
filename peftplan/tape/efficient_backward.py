"""The workspace of the memory-efficient attention kernel's backward for heads above 128 in 16 bits.

Each sample and head has accumulators in fp32: of dK and dV a block of keys for each part that the keys are split into, of dQ a
tile for each block of queries and columns.

Letters: b batch, a heads, s queries, k keys, d head size of queries and keys, dv of values.
Sources: torch, aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h (`workspace_strideBH`) and
attention_backward.cu (`num_splits_key`). One kernel takes these heads on all cards from sm70 on: `128x64_k65536` (cutlassB.h).
Left out: fp32, whose accumulators of dQ are about as large as the product that comes before them.
"""

from __future__ import annotations

from collections.abc import Mapping

from peftplan.arrays import Derived, Size, dim_at, larger, smaller
from peftplan.ledger import Dim
from peftplan.units import ceil_div

QUERIES, KEYS, COLUMNS = 128, 64, 64
"""Of a block (`kBlockSizeI`, `kBlockSizeJ`), and columns of a tile of dQ."""
TILE_HEADER = 4
"""Numbers before each tile of dQ: a lock, a counter, and padding to 128 bits (`GradQTempStorage`, kernel_backward.h)."""
MOST_PARTS = 200
"""Parts of the keys of all samples and heads, unless each has one."""


def workspace(heads: Size, queries: Size, keys: Size, head: int, of_values: int) -> Size:
    """Elements for one of so many `heads` of all samples; sizes but heads' may be arrays."""
    parts = larger(smaller(-(-keys // KEYS), MOST_PARTS // heads), 1)
    rounded = sum(ceil_div(size, QUERIES) * QUERIES for size in (head, of_values))
    tiles = -(-queries // QUERIES) * ceil_div(head, COLUMNS)
    return parts * KEYS * rounded + tiles * (QUERIES * COLUMNS + TILE_HEADER)


class Workspace(Derived):
    """Elements of the workspace for one head of a sample."""

    queries: tuple[Dim, ...]
    """b, a, s and d."""
    values: tuple[Dim, ...]
    """k and dv."""

    def __new__(cls, queries: tuple[Dim, ...], values: tuple[Dim, ...]) -> Workspace:
        """The size called by what it counts."""
        self = super().__new__(cls, f"workspace of {'·'.join(map(str, values))} for {'·'.join(map(str, queries))}")
        self.queries, self.values = queries, values
        return self

    def __getnewargs__(self) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:  # type: ignore[override]
        """What a copy is made of."""
        return self.queries, self.values

    def at(self, sizes: Mapping[str, Size]) -> Size:
        """The elements at these sizes, which may be arrays as well as integers."""
        b, a, s, d = self.queries
        k, dv = self.values
        assert isinstance(d, int)
        assert isinstance(dv, int)
        return workspace(dim_at(b, sizes) * dim_at(a, sizes), dim_at(s, sizes), dim_at(k, sizes), d, dv)
