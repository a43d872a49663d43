"""One job at arrays of batch sizes, sequence lengths and ranks: requested bytes of all points, and a replay of any one point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from peftplan.analytic.compile_job import Compiled
from peftplan.analytic.compiled import compiled, is_compiled
from peftplan.analytic.engine import analytic_peaks
from peftplan.analytic.instant import InstantPeaks
from peftplan.analytic.moments import Moments, overall
from peftplan.analytic.of_ranks import unlike
from peftplan.analytic.ranked import Ranked, of_all_ranks, of_one_rank
from peftplan.analytic.worlds import SHARED, OverRanks, over_ranks
from peftplan.arrays import Ints
from peftplan.errors import BoundError, InputError, MissingExtraError, RefusedError
from peftplan.job.inventory import Inventory, first_ranks, in_stages, of_any_device, on_each_device, on_rank
from peftplan.job.setup import MOST

try:
    import numpy as np
except ImportError:
    raise MissingExtraError("a grid of sizes (numpy)", "sweep") from None

POINTS_AT_ONCE = 2**16
"""Points whose sizes are arrays at one time, so that the next ones take their memory again."""
JOBS_KEPT = 32
"""Jobs at single ranks that are cached for replays."""


class Points(NamedTuple):
    """Flat arrays of one length. `rank` is None if all points have the job's own."""

    batch_size: Ints
    seq_len: Ints
    rank: Ints | None = None

    def take(self, where: Ints) -> Points:
        """The points at these indices."""
        return Points(self.batch_size[where], self.seq_len[where], None if self.rank is None else self.rank[where])

    def __len__(self) -> int:
        return len(self.batch_size)


class Sized:
    """A job at many sizes, for the kernels of one card. It is compiled once for all points that run the same operations.

    `at_rank`: rank → the job, None for its own. `ranks`: all ranks of the grid; empty if only the job's own.
    """

    def __init__(self, at_rank: Callable[[int | None], Inventory], ranks: Sequence[int], *, compute_capability: str) -> None:
        self.at_rank = lru_cache(maxsize=JOBS_KEPT)(at_rank)
        self.ranks = ranks
        self.compute_capability = compute_capability
        self.first = self.at_rank(ranks[0] if ranks else None)
        if self.first.job.setup.vllm_share:
            raise RefusedError(
                "use_vllm: the share of the card that vLLM takes is not known at many sizes yet; accepted: estimate"
            )
        self.of_each = self._of_each() if of_any_device(self.first) else ()
        """The GPUs that need unlike amounts."""
        self._ranked: dict[tuple[int, int | None], Ranked | OverRanks] = {}
        self._moments: dict[int, Moments] = {}
        """By identity of what `_ranked` keeps."""
        self._on_lines: dict[int, bool] = {}

    def _of_each(self) -> tuple[Sized, ...]:
        distributed = self.first.job.distributed
        assert distributed is not None
        if distributed.strategy == "device-map":
            each = lru_cache(maxsize=JOBS_KEPT)(lambda rank: on_each_device(self.at_rank(rank)))
            return tuple(self._seen(lambda rank, gpu: each(rank)[gpu], gpu) for gpu in range(distributed.world_size))
        if in_stages(self.first.job):
            firsts = first_ranks(self.first.job)
            return tuple(self._seen(lambda rank, gpu: on_rank(self.at_rank(rank), gpu), gpu) for gpu in firsts)
        reduced = self._ranked_alone(on_rank(self.first, 0)).compiled.reduced
        compared = (unlike(self.at_rank(rank), reduced) for rank in self.ranks or (None,))
        largest = sorted({gpu for ranks in compared if ranks is not None for gpu in ranks.largest})
        return tuple(self._seen(lambda rank, gpu: on_rank(self.at_rank(rank), gpu), gpu) for gpu in largest)

    def _seen(self, at_rank: Callable[[int | None, int], Inventory], gpu: int) -> Sized:
        """The job as one of its GPUs sees it."""
        return Sized(lambda rank: at_rank(rank, gpu), self.ranks, compute_capability=self.compute_capability)

    def requested(self, points: Points) -> dict[str, Ints]:
        """Phase → bytes that the tensors at its peak request, for each point, as int64; on the GPU where they are most."""
        if self.of_each:
            return _of_fullest([sized.requested(points) for sized in self.of_each])
        by_phase: dict[str, Ints] = {}
        for where, ranked in self._alike_in_parts(points):
            part, moments = points.take(where), self._moments_of(ranked)
            rank = part.rank if part.rank is not None else np.zeros(len(part), dtype=np.int64)
            standing = ranked.standing_bytes(rank)
            peaks = {
                phase: values + standing
                for phase, values in moments.peaks(ranked.named(part.batch_size, part.seq_len, rank), 0).items()
            }
            for phase, values in {"load": ranked.loading_bytes(rank), **peaks}.items():
                by_phase.setdefault(phase, np.empty(len(points), dtype=np.int64))[where] = values
        return by_phase

    def most_requested(self, points: Points) -> Ints:
        """The bytes of `requested` in the phase with most of them, for each point."""
        alike = [list(sized._alike(points)) for sized in self.of_each or (self,)]
        most: Ints = np.empty(len(points), dtype=np.int64)
        for groups in zip(*alike, strict=False):
            (where, _), *others = groups
            each = [ranked for _, ranked in groups if isinstance(ranked, OverRanks)]
            if len(each) < len(alike) or not all(np.array_equal(where, other) for other, _ in others):
                of_phases: Ints = np.maximum.reduce(list(self.requested(points).values()))
                return of_phases
            moments = overall([ranked.part() for ranked in each])
            for at in _in_parts(where):
                part = points.take(at)
                named = [ranked.named(part.batch_size, part.seq_len, part.batch_size) for ranked in each]
                most[at] = moments.peaks({name: sizes for names in named for name, sizes in names.items()}, 0)["overall"]
        return most

    def trainable(self, points: Points) -> Ints:
        """The number of trainable parameters at each point."""
        if points.rank is None:
            return np.full(len(points), self.first.parameters.num_trainable, dtype=np.int64)
        ranks, where = np.unique(points.rank, return_inverse=True)
        low, high = int(ranks[0]), int(ranks[-1])
        between = low + (high - low) // 2
        at = {rank: self.at_rank(rank).parameters.num_trainable for rank in (low, between, high)}
        if (at[between] - at[low]) * (high - low) == (at[high] - at[low]) * (between - low) and all(self._on_lines.values()):
            slope = (at[high] - at[low]) // max(high - low, 1)
            return at[low] + slope * (ranks - low)[where]
        return np.array([self.at_rank(int(rank)).parameters.num_trainable for rank in ranks], dtype=np.int64)[where]

    def peaks(self, batch_size: int, seq_len: int, rank: int | None) -> InstantPeaks:
        """The peaks of one point, equal to those of `estimate`."""
        return analytic_peaks(self._resized(batch_size, seq_len, rank), compute_capability=self.compute_capability)

    def _resized(self, batch_size: int, seq_len: int, rank: int | None) -> Inventory:
        counted = self.at_rank(rank)
        setup = counted.job.setup.model_copy(update={"batch_size": batch_size, "seq_len": seq_len})
        return counted._replace(job=counted.job._replace(setup=setup))

    def _compiled(self, batch_size: int, seq_len: int, rank: int | None) -> Compiled:
        return compiled(self._resized(batch_size, seq_len, rank), compute_capability=self.compute_capability)

    def _alike_in_parts(self, points: Points) -> Iterator[tuple[Ints, Ranked | OverRanks]]:
        """The groups of `_alike` in parts of at most `POINTS_AT_ONCE` points."""
        for where, ranked in self._alike(points):
            for part in _in_parts(where):
                yield part, ranked

    def _alike(self, points: Points) -> Iterator[tuple[Ints, Ranked | OverRanks]]:
        """Groups of points that run the same operations: their indices, and the job there."""
        first = self._resized(int(points.batch_size[0]), int(points.seq_len[0]), self._rank_at(points, 0))
        facts = self._ranked_alone(first).compiled.facts(points.batch_size, points.seq_len)
        codes = np.zeros(len(points), dtype=np.int64)
        for bit, fact in enumerate(facts):
            codes += np.broadcast_to(fact, len(points)).astype(np.int64) << bit
        for code in np.unique(codes):
            where = np.flatnonzero(codes == code)
            batch_size, seq_len = int(points.batch_size[where[0]]), int(points.seq_len[where[0]])
            if (of_all := self._on_all_ranks(int(code), batch_size, seq_len)) is not None:
                yield where, of_all
                continue
            assert points.rank is not None, "a job at its own rank alone has no line to leave"
            for rank in np.unique(points.rank[where]):
                yield where[points.rank[where] == rank], self._on_one_rank(int(code), batch_size, seq_len, int(rank))

    def _rank_at(self, points: Points, at: int) -> int | None:
        return None if points.rank is None else int(points.rank[at])

    def _on_all_ranks(self, code: int, batch_size: int, seq_len: int) -> Ranked | OverRanks | None:
        """The job at all ranks; None if a dim is not linear in the rank."""
        if len(set(self.ranks)) < 2:
            return self._on_one_rank(code, batch_size, seq_len, self.ranks[0] if self.ranks else None)
        if code not in self._on_lines:
            ranked = of_all_ranks(lambda rank: self._compiled(batch_size, seq_len, rank), self.ranks)
            self._on_lines[code] = ranked is not None
            if ranked is not None:
                self._ranked[code, None] = ranked
        return self._ranked.get((code, None))

    def _on_one_rank(self, code: int, batch_size: int, seq_len: int, rank: int | None) -> Ranked | OverRanks:
        if (code, rank) not in self._ranked:
            self._ranked[code, rank] = self._ranked_alone(self._resized(batch_size, seq_len, rank))
        return self._ranked[code, rank]

    def _moments_of(self, ranked: Ranked | OverRanks) -> Moments:
        if id(ranked) not in self._moments:
            self._moments[id(ranked)] = ranked.moments() if isinstance(ranked, OverRanks) else Moments(ranked.timeline)
        return self._moments[id(ranked)]

    def _ranked_alone(self, of_job: Inventory) -> Ranked | OverRanks:
        """A job at its own rank."""
        of_ranks = of_job.job.distributed is not None and of_job.job.distributed.strategy in SHARED and not in_stages(of_job.job)
        if of_ranks and not is_compiled(of_job, self.compute_capability):
            return over_ranks(of_job, self.compute_capability)
        return of_one_rank(compiled(of_job, compute_capability=self.compute_capability))


def _in_parts(where: Ints) -> list[Ints]:
    return [where[start : start + POINTS_AT_ONCE] for start in range(0, len(where), POINTS_AT_ONCE)]


def _of_fullest(each: Sequence[dict[str, Ints]]) -> dict[str, Ints]:
    """At each point the phases of the GPU whose overall peak is largest."""
    fullest = np.argmax([np.maximum.reduce(list(by_phase.values())) for by_phase in each], axis=0)
    return {phase: np.stack([of[phase] for of in each])[fullest, np.arange(len(fullest))] for phase in each[0]}


def checked(name: str, values: Sequence[object]) -> Ints:
    """The values of an axis as an int64 array.

    Raises InputError for a value that is no integer, BoundError for one below 1 or above `MOST`.
    """
    try:
        array = np.asarray(values if not isinstance(values, range) else np.arange(values.start, values.stop, values.step))
        if array.dtype.kind in "U":
            array = np.array([int(str(value)) for value in values])
    except (ValueError, OverflowError):
        raise InputError(name, list(values), "accepted: whole numbers") from None
    if array.dtype.kind not in "iu":
        raise InputError(name, array.tolist(), "accepted: whole numbers")
    if array.min() < 1:
        raise BoundError(name, int(array.min()), "at least 1")
    if array.max() > MOST:
        raise BoundError(name, int(array.max()), f"at most {MOST:,}")
    return array.astype(np.int64)
