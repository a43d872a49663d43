"""A timeline at many sizes at once: the moments that can be a peak, as a matrix of how many tensors of each size are alive.

Needs numpy (extra `sweep`). Exact while float64 represents every integer, up to 2⁵³ bytes; larger peaks are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from math import prod
from typing import NamedTuple

from peftplan.analytic.lazy import values_of
from peftplan.arrays import Derived, Floats, Ints
from peftplan.dtypes import ITEMSIZE
from peftplan.errors import InputError, MissingExtraError
from peftplan.ledger import Dim
from peftplan.memory.timeline import Timeline
from peftplan.units import ALLOCATION_ROUNDING

try:
    import numpy as np
except ImportError:
    raise MissingExtraError("a grid of sizes (numpy)", "sweep") from None

EXACT = 2**53 // ALLOCATION_ROUNDING
"""The largest peak that stays exact in float64, in units of `ALLOCATION_ROUNDING` bytes."""
CHUNK = 2**13
"""Points per matrix product, so that its result fits a processor's cache."""
EXCEEDING = 2**6
"""Rows that are compared with all others at points: the first ones have most tensors."""
SLACK = 1e-9
"""More than the rounding errors of float64 where one row is compared with another at all points."""

KEPT = 16
"""Of moments, those with other numbers that were asked for last."""
COMPARED = 2**4
"""Rows that are compared at a time with all that take no more in total."""
MOST_PAIRED = 2**11
"""Rows that are compared in pairs."""
MULTIPLIER = 6364136223846793005
"""Odd; its powers mix a row into one number, so that few unlike rows have the same."""

Size = tuple[int, tuple[Dim, ...]]
"""What a column counts: (bytes, named sizes).

With 0 bytes it counts units of `ALLOCATION_ROUNDING` bytes times the named sizes. Otherwise it counts tensors of that many bytes
times the named sizes, each rounded up.
"""


class Moments:
    """The moments of each phase at which its peak can be, at any size."""

    _at: dict[tuple[tuple[Size, ...], bytes], Moments]
    """Those of `at`, as they were asked for last."""

    def __init__(self, timeline: Timeline) -> None:
        self._at = {}
        index: dict[Size, int] = {}
        column: list[int] = []
        units: list[int] = []
        for of_kind in timeline.kinds:
            size, times = _size(of_kind.dtype, of_kind.dims)
            column.append(index.setdefault(size, len(index)))
            units.append(times)
        self.sizes = tuple(index)
        kinds, counts = np.array(timeline.counted_events, dtype=np.int64).reshape(-1, 2).T
        levels = np.zeros((len(kinds) + 1, len(index)), dtype=np.int64)
        levels[np.arange(1, len(kinds) + 1), np.array(column)[kinds]] = counts * np.array(units)[kinds]
        np.cumsum(levels, axis=0, out=levels)
        self.by_phase: dict[str, Floats] = {}
        makes = counts >= 0
        for phase, start, end in timeline.counted:
            turns = np.append(makes[start:end], False) < np.append(
                True, makes[start:end]
            )  # what follows frees, what precedes makes
            rows = levels[start : end + 1][turns]
            if phase in self.by_phase:
                rows = np.vstack([rows, self.by_phase[phase].astype(np.int64)])
            self.by_phase[phase] = _largest(rows)

    def at(self, constants: Mapping[str, int]) -> Moments:
        """The same moments with some of the named sizes as numbers."""
        index: dict[Size, int] = {}
        columns = self._columns(index, constants)
        key = tuple(index), columns.tobytes()
        if key not in self._at:  # of ranks that differ by less than a tensor is rounded up, once
            as_numbers = {phase: rows.astype(np.int64) @ columns for phase, rows in self.by_phase.items()}
            self._at[key] = _of(index, {phase: _largest(rows) for phase, rows in as_numbers.items()})
            if len(self._at) > KEPT:
                del self._at[next(iter(self._at))]
        return self._at[key]

    def _columns(self, index: dict[Size, int], constants: Mapping[str, int]) -> Ints:
        """What one tensor of each column adds to those of `index`, which gets what it lacks."""
        column, units = [], []
        for nbytes, dims in self.sizes:
            numbers = prod([constants[str(dim)] for dim in dims if dim in constants])
            size, times = _of_bytes((nbytes or ALLOCATION_ROUNDING) * numbers, tuple(dim for dim in dims if dim not in constants))
            column.append(index.setdefault(size, len(index)))
            units.append(times)
        columns = np.zeros((len(self.sizes), len(index)), dtype=np.int64)
        columns[np.arange(len(column)), column] = units
        return columns

    def peaks(self, points: At, standing: Ints | int) -> dict[str, Ints]:
        """Phase → bytes at its peak for every point, as int64. `standing`: bytes to add.

        Raises InputError if a peak exceeds 8 PiB.
        """
        units = points.units(self.sizes)
        by_phase = {}
        for phase, rows in self.by_phase.items():
            possible, starts = points.possible(self.sizes, rows), range(0, points.num_points, CHUNK)
            most = np.concatenate([(possible @ units[:, start : start + CHUNK]).max(axis=0) for start in starts])
            if most.max() > EXACT:
                raise InputError("seq_len", "a grid", "accepted: batches and sequences with a peak below 8 PiB")
            by_phase[phase] = most.astype(np.int64) * ALLOCATION_ROUNDING + standing
        return by_phase


class At(Mapping[str, "Ints"]):
    """Named sizes at many points. What tensors take there is evaluated once for all moments."""

    def __init__(self, num_points: int, by_name: Mapping[str, Ints]) -> None:
        """`by_name`: arrays, or `lazy` ones."""
        self.num_points, self.by_name = num_points, by_name
        self._read: dict[str, Ints] = {}
        self._units: dict[tuple[Size, ...], Floats] = {}
        self._ranges: dict[tuple[tuple[Size, ...], int], tuple[Floats, Floats]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays that have been evaluated."""
        return sum(np.asarray(values).nbytes for values in (*self._units.values(), *self._read.values()))

    def units(self, sizes: tuple[Size, ...]) -> Floats:
        """How many units a tensor of each size takes at each point."""
        if sizes not in self._units:
            products: dict[tuple[Dim, ...], Floats] = {}
            units = self._units[sizes] = np.empty((len(sizes), self.num_points))
            for row, (number, dims) in zip(units, sizes, strict=True):
                if dims not in products:
                    products[dims] = reduce(
                        np.multiply, [self[dim] for dim in dims if isinstance(dim, str)], np.ones(self.num_points)
                    )
                np.multiply(products[dims], number / ALLOCATION_ROUNDING if number else 1, out=row)
                if number:
                    np.ceil(row, out=row)
        return self._units[sizes]

    def __getitem__(self, name: str) -> Ints:
        if name not in self._read:
            self._read[name] = name.at(self) if isinstance(name, Derived) else values_of(self.by_name[name])
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def possible(self, sizes: tuple[Size, ...], rows: Floats) -> Floats:
        """The rows that can be largest at one of the points: those that no other row exceeds at all of them.

        Each size takes between a least and a most multiple of what the largest of them takes at the same point.
        """
        units = self.units(sizes)
        variable = [bool(dims) for _, dims in sizes]
        largest = int(np.argmax(rows.max(axis=0) * units[:, 0] * variable))
        if (sizes, largest) not in self._ranges:
            ratios = units / np.maximum(units[largest], 1)
            self._ranges[sizes, largest] = ratios.min(axis=1), ratios.max(axis=1)
        least, most = self._ranges[sizes, largest]
        beyond = rows[:EXCEEDING, None] - rows
        exceeds = beyond @ (least + most) > abs(beyond) @ (most - least + SLACK * most)
        return rows[~exceeds.any(axis=0)]


class Part(NamedTuple):
    """A job of several of which the one that needs most counts."""

    moments: Moments
    standing: int
    """Bytes beside its moments."""
    loading: int
    """Bytes at the peak of loading."""

    def rows(self, index: Mapping[Size, int]) -> Ints:
        """Bytes at each moment, and at last those of loading, for one of each size of `index`, whose first one is a unit."""
        moments = np.vstack([*self.moments.by_phase.values()])
        rows = np.zeros((len(moments) + 1, len(index)), dtype=np.int64)
        rows[:-1, [index[size] for size in self.moments.sizes]] = moments * ALLOCATION_ROUNDING
        rows[:, 0] += [*[self.standing] * len(moments), self.loading]
        return rows


def overall(parts: Sequence[Part]) -> Moments:
    """The moments at which one of the jobs can need most of all, as those of one phase."""
    index = _index(parts)
    rows = np.vstack([part.rows(index) for part in parts])
    return _of(index, {"overall": _largest(-(-rows // ALLOCATION_ROUNDING))})


def largest_of(parts: Sequence[Part]) -> list[int]:
    """The places of the jobs that can need most: not of one that needs no more than an earlier one, whatever the sizes are."""
    index = _index(parts)
    kept: dict[int, Ints] = {}
    for place, part in enumerate(parts):
        rows = part.rows(index)
        if not any(np.any((earlier >= rows[:, None]).all(axis=2), axis=1).all() for earlier in kept.values()):
            kept[place] = rows
    return [*kept]


def _index(parts: Sequence[Part]) -> dict[Size, int]:
    """Every size that a tensor of one of the jobs has → its place."""
    sizes: dict[Size, None] = {(0, ()): None, **dict.fromkeys(size for part in parts for size in part.moments.sizes)}
    return {size: place for place, size in enumerate(sizes)}


def _of(index: Mapping[Size, int], by_phase: dict[str, Floats]) -> Moments:
    moments = Moments.__new__(Moments)
    moments.sizes, moments.by_phase = tuple(index), by_phase
    return moments


def _largest(rows: Ints) -> Floats:
    """The rows at which a peak can be."""
    return _extreme(_undominated(rows)).astype(np.float64)


def _size(dtype: str, dims: tuple[Dim, ...]) -> tuple[Size, int]:
    """The column of a tensor and what one tensor adds to it. A tensor that always fills whole units is counted in units."""
    number = ITEMSIZE[dtype] * prod(dim for dim in dims if isinstance(dim, int))
    return _of_bytes(number, tuple(sorted(dim for dim in dims if not isinstance(dim, int))))


def _of_bytes(number: int, symbols: tuple[Dim, ...]) -> tuple[Size, int]:
    """The same for a tensor of so many bytes times the named sizes."""
    if number % ALLOCATION_ROUNDING and symbols:
        return (number, symbols), 1
    return (0, symbols), -(-number // ALLOCATION_ROUNDING)


def _undominated(rows: Ints) -> Ints:
    """The rows that no other row dominates, that is, has at least as many tensors of every size; equal ones once."""
    rest = rows[np.argsort(-rows.sum(axis=1), kind="stable")]
    largest = [rest[:0]]
    while len(rest):
        first, rest = rest[:COMPARED], rest[COMPARED:]
        largest.append(first[~np.triu((first[:, None] >= first).all(axis=2), 1).any(axis=0)])
        rest = rest[~(largest[-1][:, None] >= rest).all(axis=2).any(axis=0)]
    return np.vstack(largest)


def _extreme(rows: Ints) -> Ints:
    """The rows that do not lie midway between two others: one of those has at least as many bytes, whatever the sizes are.

    Backward frees and makes the same in each layer, so that only its first and its last layer can hold most.

        activations  gradients
        80           0          kept
        79           1          midway between its neighbours
        78           2          kept
    """
    if not 2 < len(rows) <= MOST_PAIRED:
        return rows
    mixed = rows @ np.array([pow(MULTIPLIER, n + 1, 2**62) for n in range(rows.shape[1])])
    order = np.argsort(mixed)
    beyond = 2 * mixed[:, None] - mixed
    place = order[np.minimum(np.searchsorted(mixed, beyond, sorter=order), len(rows) - 1)]
    middle, end = np.nonzero((mixed[place] == beyond) & ~np.eye(len(rows), dtype=bool))
    midway = (rows[place[middle, end]] == 2 * rows[middle] - rows[end]).all(axis=1)
    return np.delete(rows, middle[midway], axis=0)
