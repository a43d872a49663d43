"""One job at arrays of batch sizes, sequence lengths and ranks: requested bytes of all points, and a replay of any one point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from peftplan.analytic.compile_job import Compiled
from peftplan.analytic.compiled import compiled, is_compiled
from peftplan.analytic.engine import analytic_peaks
from peftplan.analytic.instant import InstantPeaks
from peftplan.analytic.moments import At, Moments, largest_of, overall
from peftplan.analytic.rank_facts import unlike
from peftplan.analytic.ranked import Ranked, of_all_ranks, of_one_rank
from peftplan.analytic.worlds import SHARED, OverRanks, over_ranks
from peftplan.arrays import Ints
from peftplan.errors import BoundError, InputError, MissingExtraError, RefusedError
from peftplan.job.evaluating import without_formula
from peftplan.job.inventory import Inventory, first_ranks, in_stages, of_any_device, on_each_device, on_rank
from peftplan.job.setup import MOST
from peftplan.scans import no_scans

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

    @no_scans()
    def requested(self, points: Points) -> dict[str, Ints]:
        """Phase → bytes that the tensors at its peak request, for each point, as int64; on the GPU where they are most."""
        by_phase: dict[str, Ints] = {}
        for where, each in self._alike(points):
            for at in _in_parts(where):
                for phase, values in self._of_fullest(each, points.take(at)).items():
                    by_phase.setdefault(phase, np.empty(len(points), dtype=np.int64))[at] = values
        return by_phase

    @no_scans()
    def most_requested(self, points: Points) -> Ints:
        """The bytes of `requested` in the phase with most of them, for each point."""
        most: Ints = np.empty(len(points), dtype=np.int64)
        for where, each in self._alike(points):
            over = [ranked for ranked in each if isinstance(ranked, OverRanks)]
            alone = len(over) == len(each) and self.first.job.setup.eval_batch_size is None
            moments = overall([ranked.part() for ranked in over]) if alone else None
            for at in _in_parts(where):
                part = points.take(at)
                if moments is None:
                    most[at] = np.maximum.reduce(list(self._of_fullest(each, part).values()))
                    continue
                named = [ranked.named(part.batch_size, part.seq_len, part.batch_size) for ranked in over]
                points_there = At(len(part), {name: sizes for of in named for name, sizes in of.by_name.items()})
                most[at] = moments.peaks(points_there, 0)["overall"]
        return most

    def _of_fullest(self, each: Sequence[Ranked | OverRanks], points: Points) -> dict[str, Ints]:
        """At each point the phases of the GPU whose overall peak is largest; `each`: the job on every GPU that is compared."""
        rank = points.rank if points.rank is not None else np.zeros(len(points), dtype=np.int64)
        above: dict[object, dict[str, Ints]] = {}
        by_phases = []
        for ranked in each:
            moments = self._moments_of(ranked)
            of = id(moments if isinstance(ranked, OverRanks) else ranked)  # ranks of one record have the same named sizes
            if of not in above:
                above[of] = moments.peaks(ranked.named(points.batch_size, points.seq_len, rank), 0)
            standing, loading = ranked.standing_bytes(rank), np.broadcast_to(ranked.loading_bytes(rank), len(points))
            beside = {phase: peak + standing for phase, peak in (*above[of].items(), *self._evaluated(points).items())}
            by_phases.append({"load": loading, **beside})
        if len(by_phases) == 1:
            return by_phases[0]
        fullest = np.argmax([np.maximum.reduce(list(by_phase.values())) for by_phase in by_phases], axis=0)
        return {phase: np.choose(fullest, [of[phase] for of in by_phases]) for phase in by_phases[0]}

    def _evaluated(self, points: Points) -> dict[str, Ints]:
        """What an evaluation requests beside what lasts, at each point; nothing where nothing is evaluated."""
        if self.first.job.setup.eval_batch_size is None or without_formula(self.first.job) is not None:
            return {}
        from peftplan.analytic.evaluation import evaluation_of

        ranks = np.zeros(len(points), dtype=np.int64) if points.rank is None else points.rank
        pairs, where = np.unique(np.stack([points.seq_len, ranks]), axis=1, return_inverse=True)
        peaks = []
        for seq_len, rank in pairs.T.tolist():
            resized = self._resized(1, seq_len, None if points.rank is None else rank)
            evaluation = evaluation_of(resized, compute_capability=self.compute_capability)
            assert evaluation is not None
            peaks.append(evaluation.peak[0])
        return {"evaluate": np.array(peaks, dtype=np.int64)[where.reshape(-1)]}

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

    def _alike(self, points: Points) -> Iterator[tuple[Ints, list[Ranked | OverRanks]]]:
        """Groups of points that run the same operations: their indices, and the job there, on every GPU that is compared."""
        each = self.of_each or (self,)
        of_steps: dict[int, tuple[Compiled, Ints]] = {}
        codes = [sized._codes(points, of_steps) for sized in each]
        joint = codes[0]
        for other in codes[1:]:
            if other is not joint:
                joint = np.unique(joint, return_inverse=True)[1] * (int(other.max()) + 1) + other
        for code in np.unique(joint):
            where = np.flatnonzero(joint == code)
            sizes = int(points.batch_size[where[0]]), int(points.seq_len[where[0]])
            of_code = [(sized, int(codes_of[where[0]])) for sized, codes_of in zip(each, codes, strict=True)]
            on_all = [sized._on_all_ranks(code, *sizes) for sized, code in of_code]
            of_all = [ranked for ranked in on_all if ranked is not None]
            if len(of_all) == len(each):
                parts = [ranked.part() for ranked in of_all if isinstance(ranked, OverRanks)]
                yield where, [of_all[place] for place in largest_of(parts)] if len(parts) == len(each) else of_all
                continue
            assert points.rank is not None, "a job at its own rank alone has no line to leave"
            for rank in np.unique(points.rank[where]):
                here = where[points.rank[where] == rank]
                yield here, [sized._on_one_rank(code, *sizes, int(rank)) for sized, code in of_code]

    def _codes(self, points: Points, of_steps: dict[int, tuple[Compiled, Ints]]) -> Ints:
        """A number for each point, the same of points that run the same operations. `of_steps`: by identity of the step that says
        what decides them, the numbers of it."""
        first = self._resized(int(points.batch_size[0]), int(points.seq_len[0]), self._rank_at(points, 0))
        step = self._ranked_alone(first).compiled
        if id(step) not in of_steps:
            codes: Ints = np.zeros(len(points), dtype=np.int64)
            for bit, fact in enumerate(step.facts(points.batch_size, points.seq_len)):
                codes += np.broadcast_to(fact, len(points)).astype(np.int64) << bit
            of_steps[id(step)] = step, codes
        return of_steps[id(step)][1]

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
