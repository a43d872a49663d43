"""The points of a sweep: a grid of options, the jobs that differ in more than sizes, and blocks of a job's points as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from peftplan.arrays import Ints
from peftplan.errors import BoundError, InputError, MissingExtraError, PeftplanError, UnknownNameError
from peftplan.job.inventory import Inventory, inventory
from peftplan.job.prepare import check_rank_allocator, prepare
from peftplan.job.resolving import check_length, check_logits_to_keep
from peftplan.job.setup import MOST, Setup, parse_setup
from peftplan.planning.assumed import NO_PICTURES
from peftplan.planning.axes import Values
from peftplan.planning.for_method import ONE_POINT, options_for
from peftplan.planning.verdicts import by_kernels, capability, placed_on

try:
    import numpy as np
except ImportError:
    raise MissingExtraError("sweep (numpy)", "sweep") from None

from peftplan.analytic.checks import check
from peftplan.analytic.sized import Points, Sized
from peftplan.analytic.sizes import between_chunks
from peftplan.job.kernels import kernels_of
from peftplan.memory import delta_rule
from peftplan.planning.decided import BY, WORDS, Decided, Limits, decide

if TYPE_CHECKING:
    import numpy.typing as npt

    from peftplan.hardware.gpus import Gpu
    from peftplan.job.job import Job as JobOfInventory
    from peftplan.job.options import Options

SIZES = ("batch_size", "seq_len", "r")
"""Options that are evaluated as arrays."""
BLOCK = 2**18
"""Points that are held at a time."""
CHUNK = 2**15
"""Points whose rows are made at a time."""
MOST_REFUSED = 200
"""Jobs that are asked for one that makes sense before any row is made."""

Value = TypeVar("Value")
Chunk = dict[str, list[object]]
"""Rows as columns: name → a list of values."""
OF_RANKS = ("gpus", "nodes", "strategy")
"""Options that have a column wherever they are set: without them a row reads as one of a single GPU."""


class Grid(NamedTuple):
    """The grid: every combination of models, methods and the values of each axis; `single` are options with one value."""

    models: Values
    methods: Sequence[str]
    axes: Mapping[str, Values]
    single: Mapping[str, object]

    def own(self, method: str, options: Mapping[str, Value]) -> dict[str, Value]:
        """The options that a method has; all of them where it is the only one, to be refused."""
        return options_for(method, options) if len(self.methods) > 1 else dict(options)

    def num_points(self) -> int:
        """Points."""
        per_model = sum(prod(len(values) for values in self.own(method, self.axes).values()) for method in self.methods)
        return len(self.models) * per_model

    def text(self) -> str:
        """The axes and how many values each has."""
        by_name: dict[str, Sequence[object]] = {"model": self.models, "method": self.methods, **self.axes}
        return " × ".join(f"{name.replace('_', ' ')} {len(values):,}" for name, values in by_name.items() if len(values) > 1)

    def of_jobs(self) -> list[str]:
        """The options that differ between jobs, and `OF_RANKS`."""
        return [name for name in (*self.axes, *self.of_ranks()) if name not in SIZES]

    def of_ranks(self) -> dict[str, object]:
        """Those of `OF_RANKS` that have one value."""
        return {name: self.single[name] for name in OF_RANKS if self.single.get(name) is not None}

    def check(self, name: str, values: Values) -> None:
        """Raise for a value that no job takes, so that a typing error is no row."""
        if name in SIZES:
            for value in (values[0], values[-1]) if isinstance(values, range) else values:
                _whole(name, value)
            return
        for value in values[:MOST_REFUSED]:
            if name in Setup.model_fields:
                parse_setup({name: value})
            try:
                self._any_job({name: value})
            except UnknownNameError:
                raise
            except PeftplanError:
                continue

    def _any_job(self, changed: Mapping[str, object]) -> None:
        """Check a job of the first method that has these options, or that refuses them if none has."""
        method = next((method for method in self.methods if changed.keys() <= self.own(method, changed).keys()), self.methods[0])
        method_option = {"method": method} if method else {}
        counted(self.models[0], **{**self.own(method, self.single), **changed, **method_option})

    def jobs(self) -> Iterator[Job]:
        """One for each model, method, and combination of the options that are no sizes."""
        for model, method in product(self.models, self.methods):
            axes = self.own(method, self.axes)
            sizes = {name: axes.pop(name) for name in SIZES if name in axes}
            single = self.own(method, self.single) | ({"method": method} if method else {})
            for values in product(*axes.values()):
                point = dict(zip(axes, values, strict=True))
                yield Job(model, method, {**single, **point}, {**self.of_ranks(), **point}, sizes)


class Job(NamedTuple):
    """A job with the sizes that its points take. `shown`: the options of its columns."""

    model: object
    method: str
    options: Mapping[str, object]
    shown: Mapping[str, object]
    sizes: Mapping[str, Values]

    def __len__(self) -> int:
        return prod(len(values) for values in self.sizes.values())

    def counted(self, rank: int | None = None, *, card: Gpu | None = None) -> Inventory:
        """The job with its parameters on a card, at its own rank or another."""
        return placed_on(counted(self.model, **self.options, **({} if rank is None else {"r": rank})), card)

    def blocks(self, cards: Sequence[Gpu]) -> Iterator[Block]:
        """Its points, so many at a time."""
        groups = [(self._sized(group[0] if group else None), group) for group in by_kernels(cards)]
        for start in range(0, len(self), BLOCK):
            yield Block(self, start, min(BLOCK, len(self) - start), groups, cards)

    def _sized(self, card: Gpu | None) -> Sized | str:
        """The job at all sizes on a card, or why there is none."""
        ranks = cast("Sequence[int]", self.sizes.get("r", ()))
        try:
            return Sized(partial(self.counted, card=card), ranks, compute_capability=capability(card))
        except PeftplanError as refused:
            return str(refused)


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


def counted(model: object, **options: object) -> Inventory:
    """A checked job with its parameters and what lasts. Raises what `estimate` raises."""
    job = prepare(model, **cast("Options", options))
    check_rank_allocator(job)
    return inventory(job)


def _values_at(name: str, values: Values, places: Ints) -> Ints:
    """Values of an axis at some places; a range is not written out."""
    if isinstance(values, range):
        return values.start + values.step * places.astype(np.int64)
    return np.array([_whole(name, value) for value in values], dtype=np.int64)[places]


def _whole(name: str, value: object) -> int:
    """A size. Raises BoundError or InputError."""
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text.lstrip("-").isdecimal():
        text = int(text)
    if isinstance(text, bool) or not (isinstance(text, int) or hasattr(text, "__index__")):
        raise InputError(name, value, "accepted: whole numbers")
    number = int(text)
    if number < 1:
        raise BoundError(name, number, "at least 1")
    if number > MOST:
        raise BoundError(name, number, f"at most {MOST:,}")
    return number


def first_of(jobs: Iterable[Job]) -> None:
    """Raise the error of the first job where no job makes sense."""
    first: PeftplanError | None = None
    for job in jobs:
        try:
            checked = job.counted(None if "r" not in job.sizes else _whole("r", job.sizes["r"][0])).job
            if "seq_len" in job.sizes:
                values = job.sizes["seq_len"]
                shortest = values[0] if isinstance(values, range) else min(_whole("seq_len", value) for value in values)
                check_length(shortest, checked.architecture.max_positions)
            return
        except PeftplanError as error:
            first = first or error
    assert first is not None
    raise first


def _refused(sized: Sized, points: Points) -> tuple[list[str | None] | None, Ints]:
    """What is wrong with points, if anything is, and the points with which nothing is."""
    job = sized.first.job
    most, least = job.architecture.max_positions, job.setup.logits_to_keep
    long = points.seq_len > most if most is not None else np.zeros(len(points), dtype=bool)
    short = points.seq_len < least if least is not None else np.zeros(len(points), dtype=bool)
    uneven = _between_chunks(job, points)
    if not (long | short | uneven).any():
        return None, np.arange(len(points))
    errors: list[str | None] = [None] * len(points)
    for at in np.flatnonzero(long | short | uneven).tolist():
        try:
            check_length(int(points.seq_len[at]), most)
            check_logits_to_keep(least, int(points.seq_len[at]))
            check(job._replace(setup=job.setup.model_copy(update={"seq_len": int(points.seq_len[at])})))
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
