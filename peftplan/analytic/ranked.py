"""A job at all LoRA ranks at once, interpolated from the job compiled at two ranks.

Each dim that depends on the rank r is linear in it, `slope × r + intercept`: r itself, or 3r if one tensor holds three matrices.
Two ranks give the line. It is then checked at three ranks, tensor by tensor and event by event. If a check fails, each rank is
compiled on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from peftplan.analytic.compile_job import Compiled
from peftplan.analytic.lazy import lazy
from peftplan.analytic.moments import At
from peftplan.arrays import Ints
from peftplan.dtypes import ITEMSIZE
from peftplan.errors import MissingExtraError
from peftplan.ledger import Dim, Line
from peftplan.memory.load import SOURCE as PASSING
from peftplan.memory.timeline import Kind, Timeline
from peftplan.units import ALLOCATION_ROUNDING

try:
    import numpy as np
except ImportError:
    raise MissingExtraError("a grid of sizes (numpy)", "sweep") from None

RANK = "r"
ASIDE = (0, 3, 7)
"""Offsets from the lowest and the highest rank at which the job is compiled, tried in this order."""
PRIMES = tuple(n for n in range(1009, 2000, 2) if all(n % d for d in range(3, 45, 2)))


class Ranked(NamedTuple):
    """A compiled job whose dims may depend on the rank. `dims`: name → (slope, intercept), such as `3r+1` → (3, 1).

    `passing`: bytes at the peak of loading before adapters exist; 0 if that is not the peak.
    """

    compiled: Compiled
    timeline: Timeline
    dims: Mapping[str, tuple[int, int]]
    standing: tuple[Line, ...]
    loaded: tuple[Line, ...]
    passing: int

    def named(self, batch_size: Ints, seq_len: Ints, rank: Ints) -> At:
        """The named sizes at arrays of one length."""
        by_rank = {name: slope * rank + intercept for name, (slope, intercept) in self.dims.items()}
        return At(len(rank), {**self.compiled.sizes_read(lazy(batch_size), lazy(seq_len)), **by_rank})

    def standing_bytes(self, rank: Ints) -> Ints:
        """Bytes that last through a step, at each rank."""
        return self._bytes(self.standing, rank)

    def loading_bytes(self, rank: Ints) -> Ints:
        """Bytes at the peak of loading, at each rank."""
        return np.maximum(self._bytes(self.loaded, rank), self.passing)

    def _bytes(self, lines: Iterable[Line], rank: Ints) -> Ints:
        lowest, highest = int(rank.min()), int(rank.max())
        if highest - lowest < len(rank):  # without a sort
            ranks, where = np.arange(lowest, highest + 1), rank - lowest
        else:
            ranks, where = np.unique(rank, return_inverse=True)
        total = np.zeros(len(ranks), dtype=np.int64)
        for line in lines:
            numel: int | Ints = ITEMSIZE[line.dtype]
            for dim in line.dims:
                slope, intercept = (0, dim) if isinstance(dim, int) else self.dims[dim]
                numel = numel * (slope * ranks + intercept)
            total += line.copies * (-(-numel // ALLOCATION_ROUNDING) * ALLOCATION_ROUNDING)
        return total[where]


def of_one_rank(compiled: Compiled) -> Ranked:
    """A job whose rank does not change."""
    return Ranked(compiled, compiled.timeline, {}, _device(compiled.standing), _device(compiled.loading), 0)


def of_all_ranks(compile_at: Callable[[int], Compiled], ranks: Sequence[int]) -> Ranked | None:
    """The job at all ranks from the lowest to the highest; None if a dim is not linear in the rank. `compile_at`: rank → the job.

    If a rank equals another dim (8 experts, r = 8), two kinds of tensors merge into one there. Then other ranks are tried.
    """
    low, high = min(ranks), max(ranks)
    if low == high:
        return of_one_rank(compile_at(low))
    checked = (low, low + (high - low) // 2, high)
    for aside in ASIDE:
        ranked = _through(low + aside, high + 2 * aside, compile_at)
        if ranked is not None and all(_holds(ranked, compile_at(rank), rank) for rank in checked):
            return ranked
    return None


def _through(low: int, high: int, compile_at: Callable[[int], Compiled]) -> Ranked | None:
    """The job on the lines through two ranks."""
    first, last = compile_at(low), compile_at(high)
    dims: dict[str, tuple[int, int]] = {}
    if (first.timeline.events, first.timeline.windows) != (last.timeline.events, last.timeline.windows):
        return None
    try:
        kinds = tuple(
            Kind(*a[:3], _lines((low, a.dims), (high, b.dims), dims))
            for a, b in zip(first.timeline.kinds, last.timeline.kinds, strict=True)
        )
        return Ranked(
            first,
            first.timeline._replace(kinds=kinds),
            dims,
            _both(_device(first.standing), _device(last.standing), (low, high), dims),
            _both(_loaded(first), _loaded(last), (low, high), dims),
            first.loading_bytes if len(_loaded(first)) < len(_device(first.loading)) else 0,
        )
    except ValueError:  # the two jobs differ in more than the rank
        return None


def _lines(low: tuple[int, Sequence[Dim]], high: tuple[int, Sequence[Dim]], dims: dict[str, tuple[int, int]]) -> tuple[Dim, ...]:
    """The dims of one tensor at two ranks, merged: those that differ get a name."""
    (low_rank, low_dims), (high_rank, high_dims) = low, high
    return tuple(_line((low_rank, a), (high_rank, b), dims) for a, b in zip(low_dims, high_dims, strict=True))


def _line(low: tuple[int, Dim], high: tuple[int, Dim], dims: dict[str, tuple[int, int]]) -> Dim:
    (low_rank, a), (high_rank, b) = low, high
    if a == b:
        return a
    if isinstance(a, str) or isinstance(b, str) or (b - a) % (high_rank - low_rank):
        raise ValueError("no line through whole numbers")
    slope = (b - a) // (high_rank - low_rank)
    intercept = a - slope * low_rank
    name = f"{slope}{RANK}{intercept:+}"
    dims[name] = slope, intercept
    return name


def _both(
    low: tuple[Line, ...], high: tuple[Line, ...], ranks: tuple[int, int], dims: dict[str, tuple[int, int]]
) -> tuple[Line, ...]:
    return tuple(a._replace(dims=_lines((ranks[0], a.shape), (ranks[1], b.shape), dims)) for a, b in zip(low, high, strict=True))


def _holds(ranked: Ranked, compiled: Compiled, rank: int) -> bool:
    """Whether the interpolated job equals the one compiled at a rank, event by event, with a prime for each named size."""
    names = compiled.sizes(1, 1)
    at = dict(zip(names, PRIMES, strict=False))
    by_rank = {name: slope * rank + intercept for name, (slope, intercept) in ranked.dims.items()}
    where = np.array([rank])
    return (
        len(names) <= len(PRIMES)
        and ranked.timeline.windows == compiled.timeline.windows
        and _bytes_of(ranked.timeline, at | by_rank) == _bytes_of(compiled.timeline, at)
        and int(ranked.standing_bytes(where)[0]) == compiled.standing_bytes
        and int(ranked.loading_bytes(where)[0]) == compiled.loading_bytes
    )


def _bytes_of(timeline: Timeline, dims: Mapping[str, int]) -> list[int]:
    """Bytes that each event allocates, or negative, frees."""
    return [
        count * ITEMSIZE[kind.dtype] * prod(dim if isinstance(dim, int) else dims[dim] for dim in kind.dims)
        for kind, count in ((timeline.kinds[number], count) for number, count in timeline.events)
    ]


def _loaded(compiled: Compiled) -> tuple[Line, ...]:
    """What loading leaves behind, without temporaries of loading, which do not depend on the adapter."""
    return tuple(line for line in _device(compiled.loading) if line.source != PASSING)


def _device(lines: Iterable[Line]) -> tuple[Line, ...]:
    return tuple(line for line in lines if line.place == "device")
