"""A timeline at many sizes at once: the moments that can be a peak, as a matrix of how many tensors of each size are alive.

numpy, from the extra `sweep`. Exact: bytes stay below 2⁵³, where float64 counts every integer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftplan.dtypes import ITEMSIZE
from peftplan.errors import MissingExtraError
from peftplan.memory.ledger import Dim
from peftplan.memory.timeline import Timeline
from peftplan.units import ALLOCATION_ROUNDING

try:
    import numpy as np
except ImportError:
    raise MissingExtraError("a grid of sizes (numpy)", "sweep") from None

CHUNK = 2**14
"""Points at a time: what a processor's cache holds."""

Size = tuple[int, tuple[Dim, ...]]
"""Bytes of an element, and the dims in a fixed order."""


class Moments:
    """The moments of each phase at which its peak can lie, whatever the sizes."""

    def __init__(self, timeline: Timeline) -> None:
        index: dict[Size, int] = {}
        column = [index.setdefault(_size(k.dtype, k.dims), len(index)) for k in timeline.kinds]
        self.sizes = tuple(index)
        steps = np.zeros((len(timeline.events), len(index)), dtype=np.int32)
        for at, (kind, count) in enumerate(timeline.events):
            steps[at, column[kind]] += count
        levels = np.vstack([np.zeros((1, len(index)), dtype=np.int32), np.cumsum(steps, axis=0, dtype=np.int32)])
        self.by_phase: dict[str, Any] = {}
        for phase, start, end in timeline.windows:
            rows = np.unique(levels[start : end + 1], axis=0)
            if phase in self.by_phase:
                rows = np.unique(np.vstack([rows, self.by_phase[phase]]), axis=0)
            self.by_phase[phase] = _undominated(rows)

    def peaks(self, named: Mapping[str, Any], standing: int) -> dict[str, Any]:
        """Phase → bytes at its peak for every point; `named` are arrays of one length."""
        length = len(next(iter(named.values())))
        found = {phase: np.empty(length, dtype=np.int64) for phase in self.by_phase}
        for start in range(0, length, CHUNK):
            part = {name: values[start : start + CHUNK] for name, values in named.items()}
            points = len(next(iter(part.values())))
            nbytes = np.empty((len(self.sizes), points))
            for row, (itemsize, dims) in enumerate(self.sizes):
                numel: Any = itemsize
                for dim in dims:
                    numel = numel * (dim if isinstance(dim, int) else part[dim])
                nbytes[row] = (numel + (ALLOCATION_ROUNDING - 1)) // ALLOCATION_ROUNDING
            for phase, rows in self.by_phase.items():
                best = (rows @ nbytes).max(axis=0).astype(np.int64)
                found[phase][start : start + points] = best * ALLOCATION_ROUNDING + standing
        return found


def _size(dtype: str, dims: tuple[Dim, ...]) -> Size:
    """Numbers multiplied, named sizes sorted."""
    number = ITEMSIZE[dtype]
    for dim in dims:
        number *= dim if isinstance(dim, int) else 1
    return number, tuple(sorted(dim for dim in dims if not isinstance(dim, int)))


def _undominated(rows: Any) -> Any:
    """Rows of which no other has at least as many tensors of every size."""
    order = np.argsort(-rows.sum(axis=1), kind="stable")
    kept: list[Any] = []
    for row in rows[order]:
        if not kept or not (np.asarray(kept) >= row).all(axis=1).any():
            kept.append(row)
    return np.asarray(kept, dtype=np.float64)
