"""Verdicts on many points with few replays: by what tensors request where that is enough, else by a bound, near a card's limit by
a replay.

What torch's allocator reserves is at least what tensors request, so a point that requests more than a card has `does_not_fit`.
How much more it may reserve has no bound that helps (a best-fit allocator's worst case is a multiple of every block's size), so
the other side is an assumption with its evidence: a point is taken to reserve at most `requested × (1 + FLOOR + CAUTION ×
excess)` and `SEGMENTS` more, where `excess` is the largest share by which points of the same job that were replayed reserve more
than they request. Of some thousand replays of random jobs, none broke it where eight other points of its job were known; see
`tests/planning/test_sweep.py` and `python -m tools.sweep_bound`. Points that this leaves open are replayed, up to a number; what
is still open then has no verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from peftplan.analytic.instant import InstantPeaks
from peftplan.analytic.sized import Points, Sized
from peftplan.arrays import Codes, Flags, Ints
from peftplan.errors import MissingExtraError
from peftplan.hardware.context import context_for_verdict
from peftplan.hardware.gpus import Gpu
from peftplan.hardware.usable import usable_bytes
from peftplan.job.requirements import refused_batch, unmet
from peftplan.planning.verdicts import verdict
from peftplan.results.verdict import TIGHT
from peftplan.units import MIB

try:
    import numpy as np
except ImportError:
    raise MissingExtraError("a grid of sizes (numpy)", "sweep") from None

CAUTION, FLOOR = 2.0, 0.5
"""How much of the largest excess that was seen, and what beside it, is granted to points that are not replayed."""
SEGMENTS = 64 * MIB
"""What small jobs reserve beyond any share: a few segments of 20 MiB and of 2 MiB."""
PROBES = 8
"""Points of a job that are replayed to see its excess."""
WORDS = (None, "fits", "tight", "does_not_fit", "does_not_run", "unknown")
BY = (None, "requested", "bound", "replay")
"""How a verdict came about; None where there is none."""


class Limits(NamedTuple):
    """A card's bytes: what a program can use, the context in it, what is left for the allocator, and where `fits` ends."""

    card: Gpu
    usable: int
    context: int
    room: int
    fits: int
    refused: str | None

    @classmethod
    def of(cls, card: Gpu, sized: Sized) -> Limits:
        """The limits of a job on a card."""
        usable, context = usable_bytes(card).bytes, context_for_verdict(card).bytes
        room = usable - context
        why = unmet(sized.first.job.setup, card.compute_capability)
        return cls(card, usable, context, room, room - int(-(-TIGHT * usable // 1)), why)


class Decided(NamedTuple):
    """Arrays of the points: codes of `WORDS` and `BY` for each card; allocated and reserved bytes, and those of the GPU that
    reserves most, -1 where nothing was replayed, and where reserved bytes are not known."""

    verdicts: Codes
    by: Codes
    allocated: Ints
    reserved: Ints
    at_most: Ints
    replayed: int


def decide(
    sized: Sized,
    points: Points,
    requested: Ints,
    cards: Sequence[Limits],
    *,
    replays: int | None,
    progress: Callable[[float], None] = lambda share: None,
) -> Decided:
    """The verdict of every point on every card, with at most `replays` replays (None: as many as there are points).

    `requested`: bytes of the tensors at the overall peak of each point. `progress` is told the share of replays that is done.
    """
    count = len(points)
    state = _State(sized, points, requested, cards)
    open_points = np.flatnonzero(state.undecided().any(axis=0)) if cards else np.arange(count)
    if replays is None or len(open_points) <= max(replays, 0):
        state.replay(open_points, progress)
    elif cards and replays:
        probes = _spread(open_points[np.argsort(requested[open_points], kind="stable")], min(PROBES, replays))
        state.replay(probes, lambda share: None)
        if len(probes) == PROBES:
            state.bound()
        near = np.flatnonzero(state.undecided().any(axis=0))
        state.replay(_spread(near, replays - len(probes)), progress)
    return Decided(state.verdicts, state.by, state.allocated, state.reserved, state.at_most, state.replayed)


class _State:
    """What is known so far."""

    def __init__(self, sized: Sized, points: Points, requested: Ints, cards: Sequence[Limits]) -> None:
        count = len(points)
        self.sized, self.points, self.requested, self.cards = sized, points, requested, cards
        self.allocated = np.full(count, -1, dtype=np.int64)
        self.reserved = np.full(count, -1, dtype=np.int64)
        self.at_most = np.full(count, -1, dtype=np.int64)
        self.verdicts = np.zeros((len(cards), count), dtype=np.int8)
        self.by = np.zeros((len(cards), count), dtype=np.int8)
        self.replayed = 0
        refused = self._refused_batches()
        for number, card in enumerate(cards):
            if card.refused is not None:
                self._say(number, np.arange(count), "does_not_run", "requested")
            else:
                self._say(number, np.flatnonzero(requested > card.room), "does_not_fit", "requested")
                self._say(number, np.flatnonzero(refused), "does_not_run", "requested")

    def _refused_batches(self) -> Flags:
        """Whether the trainer refuses each point's batch size."""
        job = self.sized.first.job
        sizes, where = np.unique(self.points.batch_size, return_inverse=True)
        setups = (job.setup.model_copy(update={"batch_size": size}) for size in sizes.tolist())
        return np.array([refused_batch(setup, job.replicas) is not None for setup in setups], dtype=bool)[where]

    def undecided(self) -> Flags:
        """Cards × points without a verdict."""
        undecided: Flags = self.verdicts == 0
        return undecided

    def replay(self, where: Ints, progress: Callable[[float], None]) -> None:
        """Replay these points, and say what that means on every card."""
        for done, at in enumerate(where.tolist()):
            peaks = self._peaks(at)
            self.allocated[at] = peaks.allocated
            most = peaks.reserved_at_most if self.cards else peaks.reserved
            if peaks.reserved is not None and most is not None:
                self.reserved[at], self.at_most[at] = peaks.reserved, most
            for number in np.flatnonzero(self.verdicts[:, at] == 0).tolist():
                decision = verdict(self.cards[number].card, 0, peaks, peaks.runs_within)
                self._say(number, at, decision.verdict, "replay")
            progress(done / len(where))
        self.replayed += len(where)

    def bound(self) -> None:
        """Say `fits` where even the bound leaves enough."""
        known = self.at_most >= 0
        if not known.any():
            return
        excess = max(float((self.at_most[known] / self.requested[known]).max()) - 1, 0.0)
        most = self.requested * (1 + FLOOR + CAUTION * excess) + SEGMENTS
        for number, card in enumerate(self.cards):
            self._say(number, np.flatnonzero((self.verdicts[number] == 0) & (most <= card.fits)), "fits", "bound")

    def _peaks(self, at: int) -> InstantPeaks:
        rank = None if self.points.rank is None else int(self.points.rank[at])
        return self.sized.peaks(int(self.points.batch_size[at]), int(self.points.seq_len[at]), rank)

    def _say(self, card: int, where: Ints | int, word: str, by: str) -> None:
        self.verdicts[card, where] = WORDS.index(word)
        self.by[card, where] = BY.index(by)


def _spread(values: Ints, count: int) -> Ints:
    """At most `count` of the values, evenly spread, the first and the last among them."""
    if len(values) <= count:
        return values
    return values[np.unique(np.linspace(0, len(values) - 1, max(count, 0)).round().astype(np.int64))]
