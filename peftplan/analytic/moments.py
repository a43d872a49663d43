"""A timeline at many sizes at once: the moments that can be a peak, as a matrix of how many tensors of each size are alive.

Needs numpy (extra `sweep`). Exact while float64 represents every integer, up to 2⁵³ bytes; larger peaks are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from peftplan.arrays import Floats, Ints
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
CHUNK = 2**14
"""Points per matrix product, so that its operands fit a processor's cache."""

KEPT = 16
"""Of moments, those with other numbers that were asked for last."""
COMPARED = 2**7
"""Rows that are compared at a time with those that are largest so far."""
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
        steps = np.zeros((len(timeline.counted_events), len(index)), dtype=np.int64)
        for at, (kind, count) in enumerate(timeline.counted_events):
            steps[at, column[kind]] += count * units[kind]
        levels = np.vstack([np.zeros((1, len(index)), dtype=np.int64), np.cumsum(steps, axis=0)])
        self.by_phase: dict[str, Floats] = {}
        makes = np.array([count >= 0 for _, count in timeline.counted_events], dtype=bool)
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

    def peaks(self, dims_by_name: Mapping[str, Ints], standing: int) -> dict[str, Ints]:
        """Phase → bytes at its peak for every point, as int64. `named`: arrays of one length. `standing`: bytes to add.

        Raises InputError if a peak exceeds 8 PiB.
        """
        length = len(next(iter(dims_by_name.values())))
        by_phase = {phase: np.empty(length, dtype=np.int64) for phase in self.by_phase}
        used = {str(dim) for _, dims in self.sizes for dim in dims}
        chunk = min(CHUNK, length)
        units, levels = (np.empty((rows, chunk)) for rows in (len(self.sizes), max(map(len, self.by_phase.values()))))
        for start in range(0, length, chunk):
            points = min(chunk, length - start)
            part = {name: dims_by_name[name][start : start + points].astype(np.float64) for name in used}
            for row, (number, dims) in zip(units[:, :points], self.sizes, strict=True):
                row[:] = number / ALLOCATION_ROUNDING if number else 1
                for dim in dims:
                    row *= part[str(dim)]
                if number:
                    np.ceil(row, out=row)
            for phase, rows in self.by_phase.items():
                best = np.matmul(rows, units[:, :points], out=levels[: len(rows), :points]).max(axis=0)
                if best.max() > EXACT:
                    raise InputError("seq_len", "a grid", "accepted: batches and sequences with a peak below 8 PiB")
                by_phase[phase][start : start + points] = best.astype(np.int64) * ALLOCATION_ROUNDING + standing
        return by_phase


class Part(NamedTuple):
    """A job of several of which the one that needs most counts. `constants`: as in `Moments.at`."""

    moments: Moments
    constants: Mapping[str, int]
    standing: int
    """Bytes beside its moments."""
    loading: int
    """Bytes at the peak of loading."""


def overall(parts: Sequence[Part]) -> Moments:
    """The moments at which one of the jobs can need most of all, as those of one phase."""
    index: dict[Size, int] = {(0, ()): 0}
    added = []
    for of, constants, standing, loading in parts:
        columns = of._columns(index, constants)
        rows = np.vstack([*of.by_phase.values()]).astype(np.int64) @ columns
        rows[:, 0] += -(-standing // ALLOCATION_ROUNDING)
        loaded = np.zeros((1, len(index)), dtype=np.int64)
        loaded[0, 0] = -(-loading // ALLOCATION_ROUNDING)
        added += [rows, loaded]
    as_wide = [np.pad(rows, ((0, 0), (0, len(index) - rows.shape[1]))) for rows in added]
    return _of(index, {"overall": _largest(np.vstack(as_wide))})


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
    largest = rest[:0]
    for start in range(0, len(rest), COMPARED):
        part = rest[start : start + COMPARED]
        part = part[~(largest[:, None] >= part).all(axis=2).any(axis=0)]
        more = []
        while len(part):
            more.append(part[:1])
            part = part[(part > part[0]).any(axis=1)]
        largest = np.vstack([largest, *more])
    return largest


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
