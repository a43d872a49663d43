"""The points of a sweep: blocks of a job's points, evaluated as arrays, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from peftplan.arrays import Ints
from peftplan.errors import MissingExtraError, PeftplanError
from peftplan.job.evaluating import not_counted
from peftplan.job.resolving import check_length, check_logits_to_keep
from peftplan.planning.assumed import NO_PICTURES
from peftplan.planning.axes import Values
from peftplan.planning.for_method import ONE_POINT
from peftplan.planning.sweep_grid import Job, whole
from peftplan.planning.verdicts import by_kernels, capability

try:
    import numpy as np
except ImportError:
    raise MissingExtraError("sweep (numpy)", "sweep") from None

from peftplan.analytic.checks import check
from peftplan.analytic.kernel_checks import fused_by_awq
from peftplan.analytic.sized import Points, Sized
from peftplan.analytic.sizes import between_chunks
from peftplan.job.kernels import kernels_of
from peftplan.memory import delta_rule
from peftplan.planning.decided import BY, WORDS, Decided, Limits, decide

if TYPE_CHECKING:
    import numpy.typing as npt

    from peftplan.hardware.gpus import Gpu
    from peftplan.job.job import Job as JobOfInventory

BLOCK = 2**18
"""Points that are held at a time."""
CHUNK = 2**15
"""Points whose rows are made at a time."""
Chunk = dict[str, list[object]]
"""Rows as columns: name → a list of values."""


class Block:
    """Some of a job's points, on all cards."""

    def __init__(
        self, job: Job, start: int, count: int, groups: Sequence[tuple[Sized | str, Sequence[Gpu]]], cards: Sequence[Gpu]
    ) -> None:
        """`groups`: the job on cards that run the same kernels, or why it has no points there; and these cards."""
        self.job, self.start, self.count, self.groups, self.cards = job, start, count, groups, cards
        self.replayed = 0
        first, _ = groups[0]
        self.first = None if isinstance(first, str) else first.first.job
        of_text = self.first is not None and self.first.architecture.has_towers
        self.warnings = (*(self.first.warnings if self.first else ()), *([NO_PICTURES] if of_text else []))

    def points(self) -> dict[str, Ints]:
        """The sizes of the points, as arrays."""
        shape = [len(values) for values in self.job.sizes.values()]
        places = np.unravel_index(np.arange(self.start, self.start + self.count), shape) if shape else ()
        at = {name: _values_at(name, values, place) for (name, values), place in zip(self.job.sizes.items(), places, strict=True)}
        for name in ("batch_size", "seq_len"):
            if name not in at and self.first is not None:
                at[name] = np.full(self.count, getattr(self.first.setup, name), dtype=np.int64)
        return at

    def rows(self, columns: Sequence[str], replays: int | None, tell: Callable[[int, float], None]) -> Iterator[Chunk]:
        """The rows of the block, as columns."""
        at = self.points()
        arrays, errors = self._evaluated(at, replays, tell)
        of_job = {**dict.fromkeys(columns), **self.job.shown, **self._facts()}
        cards = max(len(self.cards), 1)
        for start in range(0, self.count, CHUNK):
            part = slice(start, min(start + CHUNK, self.count))
            length = (part.stop - part.start) * cards
            chunk: Chunk = {name: [value] * length for name, value in of_job.items()}
            for name, values in at.items():
                chunk[name] = [*np.repeat(values[part], cards).tolist()]
            for name, by_card in arrays.items():
                chunk[name] = [value for values in zip(*(each[part] for each in by_card), strict=True) for value in values]
            if errors is not None:
                chunk["error"] = [error for error in errors[part] for _ in range(cards)]
            yield chunk

    def _facts(self) -> dict[str, object]:
        """Columns that are the same at all points."""
        if self.first is None:
            return {"model": _name(self.job.model), "method": self.job.method}
        rank = getattr(self.first.config, "r", None)
        facts = {"model": self.first.architecture.name, "method": self.first.method_name}
        return facts | ({"r": rank} if isinstance(rank, int) else {})

    def _evaluated(
        self, at: Mapping[str, Ints], replays: int | None, tell: Callable[[int, float], None]
    ) -> tuple[dict[str, list[list[object]]], list[str | None] | None]:
        """Column → a list of values for each card; and what is wrong with points, if anything is."""
        first, _ = self.groups[0]
        if isinstance(first, str):
            return {}, [first] * self.count
        points = Points(at["batch_size"], at["seq_len"], at.get("r"))
        errors, good = _refused(first, points)
        columns: dict[str, list[list[object]]] = {}
        if not len(good):
            return {}, errors
        share = None if replays is None else replays // len(self.groups)
        by_card: dict[str, dict[str, list[object]]] = {}
        for sized, group in self.groups:
            if isinstance(sized, str):
                continue
            try:
                values = self._of_kernels(sized, points.take(good), group, share, tell)
            except PeftplanError as missing:
                return {}, [_without_formula(missing)] * self.count
            by_card |= values
        for on_card in [card.id for card in self.cards] or [""]:
            for name, column in by_card[on_card].items():
                columns.setdefault(name, []).append(_scattered(column, good, self.count))
        return columns, errors

    def _of_kernels(
        self, sized: Sized, points: Points, cards: Sequence[Gpu], replays: int | None, tell: Callable[[int, float], None]
    ) -> dict[str, dict[str, list[object]]]:
        """Card → column → values, for cards that run the same kernels."""
        requested = sized.most_requested(points)
        limits = [Limits.of(card, sized) for card in cards]
        decided = decide(sized, points, requested, limits, replays=replays, progress=lambda share: tell(self.count, share))
        self.replayed += decided.replayed
        shared = {
            "trainable_parameters": sized.trainable(points).tolist(),
            "requested_bytes": requested.tolist(),
            "peak_allocated": _known(decided.allocated),
            "peak_reserved": _known(decided.reserved),
        }
        if not cards:
            return {"": shared}
        return {card.card.id: shared | _on_card(card, number, decided) for number, card in enumerate(limits)}


def _on_card(card: Limits, number: int, decided: Decided) -> dict[str, list[object]]:
    count = len(decided.at_most)
    needed = [None if reserved < 0 else reserved + card.context for reserved in decided.at_most.tolist()]
    return {
        "gpu": [card.card.id] * count,
        "usable_bytes": [card.usable] * count,
        "context_bytes": [card.context] * count,
        "needed_bytes": needed,
        "headroom_bytes": [None if n is None else card.usable - n for n in needed],
        "verdict": list(map(WORDS.__getitem__, decided.verdicts[number].tolist())),
        "decided_by": list(map(BY.__getitem__, decided.by[number].tolist())),
    }


def blocks(job: Job, cards: Sequence[Gpu]) -> Iterator[Block]:
    """The points of a job, so many at a time."""
    groups = [(_sized(job, group[0] if group else None), group) for group in by_kernels(cards)]
    for start in range(0, len(job), BLOCK):
        yield Block(job, start, min(BLOCK, len(job) - start), groups, cards)


def _sized(job: Job, card: Gpu | None) -> Sized | str:
    """The job at all sizes on a card, or why there is none."""
    ranks = cast("Sequence[int]", job.sizes.get("r", ()))
    try:
        sized = Sized(partial(job.counted, card=card), ranks, compute_capability=capability(card))
    except PeftplanError as refused:
        return str(refused)
    return next(iter(not_counted(sized.first.job)), sized)


def _values_at(name: str, values: Values, places: Ints) -> Ints:
    """Values of an axis at some places; a range is not written out."""
    if isinstance(values, range):
        return values.start + values.step * places.astype(np.int64)
    return np.array([whole(name, value) for value in values], dtype=np.int64)[places]


def _refused(sized: Sized, points: Points) -> tuple[list[str | None] | None, Ints]:
    """What is wrong with points, if anything is, and the points with which nothing is."""
    job = sized.first.job
    most, least = job.architecture.max_positions, job.setup.logits_to_keep
    long = points.seq_len > most if most is not None else np.zeros(len(points), dtype=bool)
    short = points.seq_len < least if least is not None else np.zeros(len(points), dtype=bool)
    uneven = _between_chunks(job, points) | fused_by_awq(job, points.batch_size * points.seq_len)
    if not (long | short | uneven).any():
        return None, np.arange(len(points))
    errors: list[str | None] = [None] * len(points)
    for at in np.flatnonzero(long | short | uneven).tolist():
        try:
            check_length(int(points.seq_len[at]), most)
            check_logits_to_keep(least, int(points.seq_len[at]))
            sizes = {"batch_size": int(points.batch_size[at]), "seq_len": int(points.seq_len[at])}
            check(job._replace(setup=job.setup.model_copy(update=sizes)))
        except PeftplanError as error:
            errors[at] = _without_formula(error)
    return errors, np.flatnonzero(~(long | short | uneven))


def _between_chunks(job: JobOfInventory, points: Points) -> npt.NDArray[np.bool_]:
    """Points at which Mamba 2 or a delta rule in torch's operations has no formula, though it has one at others."""
    uneven = np.zeros(len(points), dtype=bool)
    if any(block.delta_rule is not None for block in job.architecture.blocks):
        uneven |= points.seq_len > delta_rule.CHUNK * delta_rule.MOST_CHUNKS
    if kernels_of(job.setup.kernels or ()).scan is None:
        for fact in between_chunks(points.seq_len, job.architecture):
            uneven |= fact
    return uneven


def _known(values: Ints) -> list[int | None]:
    return [None if value < 0 else value for value in values.tolist()]


def _scattered(values: list[object], where: Ints, count: int) -> list[object]:
    """Values at some of `count` places, None at the others."""
    if len(values) == count:
        return values
    column: list[object] = [None] * count
    for at, value in zip(where.tolist(), values, strict=True):
        column[at] = value
    return column


def _without_formula(missing: PeftplanError) -> str:
    """Why a job has no numbers, and what counts it."""
    return f"no formula for {missing}; {ONE_POINT}" if getattr(missing, "hint", "") else str(missing)


def _name(model: object) -> str:
    return (
        model or ""
        if model is None or isinstance(model, str)
        else str(getattr(model, "name_or_path", "") or type(model).__name__)
    )
