"""A job at arrays of its sizes: requested bytes at every point, and verdicts as far as few replays reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from peftplan.analytic.sized import Points, Sized
from peftplan.arrays import Ints, Objects
from peftplan.errors import InputError, MissingExtraError, RefusedError
from peftplan.hardware.gpus import Gpu
from peftplan.job.inventory import Inventory
from peftplan.job.resolving import check_length, check_logits_to_keep
from peftplan.job.setup import MOST
from peftplan.planning.decided import BY, WORDS, Decided, Limits, decide
from peftplan.planning.verdicts import by_kernels, capability, placed_on
from peftplan.results.grid import Grid

try:
    import numpy as np
except ImportError:
    raise MissingExtraError("a grid of sizes (numpy)", "sweep") from None

OWN = ("batch_size", "seq_len")
"""Sizes by which a job is evaluated as it is; for others, the rank but for, it is made ready again for each value."""


def grid(
    job_with: Callable[[Mapping[str, int]], Inventory],
    sizes: Mapping[str, object],
    *,
    cards: Sequence[Gpu],
    replays: int | None,
) -> Grid:
    """The job at every point of `sizes` (whole numbers, lists or arrays, broadcast against each other).

    `job_with`: other options of the job → the job. Raises InputError for sizes below 1, and for sequences longer than the model's
    positions or shorter than `logits_to_keep`; RefusedError for arrays whose shapes do not agree.
    """
    arrays = {name: _whole(name, values) for name, values in sizes.items()}
    try:
        shape = np.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} has {'×'.join(map(str, array.shape))}" for name, array in arrays.items() if array.shape)
        raise RefusedError(f"sizes must broadcast against each other: {shapes}; [[1], [2]] beside [512, 1024] do") from None
    at = {name: np.broadcast_to(array, shape) for name, array in arrays.items()}
    flat = {name: values.ravel() for name, values in at.items()}
    count = len(next(iter(flat.values())))
    by_phase: dict[str, Ints] = {}
    memory = {name: np.full(count, -1, dtype=np.int64) for name in ("allocated", "reserved")}
    words = {card.id: np.full((2, count), None, dtype=object) for card in cards}
    for where, options in _jobs(flat):
        points = Points(flat["batch_size"][where], flat["seq_len"][where], flat["r"][where] if "r" in flat else None)
        share = None if replays is None else replays * len(where) // count
        for number, group in enumerate(by_kernels(cards)):
            sized = _sized(job_with, options, points, group[0] if group else None)
            requested = sized.requested(points)
            peak = np.maximum.reduce(list(requested.values()))
            decided = decide(sized, points, peak, [Limits.of(card, sized) for card in group], replays=share)
            if number == 0:  # requested bytes are those of the first card's kernels
                for phase, values in requested.items():
                    by_phase.setdefault(phase, np.empty(count, dtype=np.int64))[where] = values
                memory["allocated"][where], memory["reserved"][where] = decided.allocated, decided.reserved
            _keep(words, group, decided, where)
    allocated, reserved = (np.ma.masked_less(values, 0).reshape(shape) for values in memory.values())
    return Grid(
        {name: values.astype(np.int64) for name, values in at.items()},
        {phase: values.reshape(shape) for phase, values in by_phase.items()},
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        verdicts={card: both[0].reshape(shape) for card, both in words.items()},
        decided_by={card: both[1].reshape(shape) for card, both in words.items()},
    )


def _whole(name: str, values: object) -> Ints:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.size == 0 or array.min() < 1 or array.max() > MOST:
        raise InputError(name, array.tolist(), f"accepted: whole numbers from 1 to {MOST}")
    return array


def _jobs(flat: Mapping[str, Ints]) -> Iterator[tuple[Ints, dict[str, int]]]:
    """Points that differ in nothing but batch, sequence and rank, and their other sizes."""
    others = [name for name in flat if name not in (*OWN, "r")]
    if not others:
        yield np.arange(len(flat["batch_size"])), {}
        return
    values, which = np.unique(np.stack([flat[name] for name in others]), axis=1, return_inverse=True)
    for number in range(values.shape[1]):
        yield np.flatnonzero(which.ravel() == number), dict(zip(others, values[:, number].tolist(), strict=True))


def _sized(
    job_with: Callable[[Mapping[str, int]], Inventory], options: Mapping[str, int], points: Points, card: Gpu | None
) -> Sized:
    ranks = [] if points.rank is None else np.unique(points.rank).tolist()
    sized = Sized(
        lambda rank: placed_on(job_with(options if rank is None else {**options, "r": rank}), card),
        ranks,
        compute_capability=capability(card),
    )
    job = sized.first.job
    check_length(int(points.seq_len.max()), job.architecture.max_positions)
    check_logits_to_keep(job.setup.logits_to_keep, int(points.seq_len.min()))
    return sized


def _keep(words: Mapping[str, Objects], cards: Sequence[Gpu], decided: Decided, where: Ints) -> None:
    for number, card in enumerate(cards):
        words[card.id][0, where] = [WORDS[code] for code in decided.verdicts[number].tolist()]
        words[card.id][1, where] = [BY[code] for code in decided.by[number].tolist()]
