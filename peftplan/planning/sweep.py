"""`sweep`: a job at every point of a grid over any of its options, on any cards, as a stream of rows.

Batch sizes, sequence lengths and ranks are evaluated as arrays, other options job by job. Memory is bounded by a block of points,
however large the grid is. `planning.decided` says how verdicts come about.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from peftplan.errors import BoundError, InputError, MissingExtraError, PeftplanError, RefusedError, UnknownNameError
from peftplan.job.inventory import Inventory, inventory
from peftplan.job.prepare import check_rank_allocator, prepare
from peftplan.job.setup import MOST, Setup, check_length, check_logits_to_keep, parse_setup
from peftplan.job.words import MEANINGS
from peftplan.planning.axes import Values, separated, values_of
from peftplan.planning.for_method import known_methods, options_for
from peftplan.planning.verdicts import capability, find_cards

try:
    import numpy as np
except ImportError:
    raise MissingExtraError("sweep (numpy)", "sweep") from None

from peftplan.analytic.compiled import kernels
from peftplan.analytic.sized import Points, Sized
from peftplan.planning.decided import BY, WORDS, Decided, Limits, decide

if TYPE_CHECKING:
    from peftplan.hardware.gpus import Gpu

SIZES = ("batch_size", "seq_len", "r")
"""Options that are evaluated as arrays."""
BLOCK = 2**18
"""Points that are held at a time."""
CHUNK = 2**15
"""Points whose rows are made at a time."""
MOST_ROWS = 10_000_000
"""Rows that are made without being asked twice."""
REPLAYS = 2000
"""Points that are replayed, where nothing else is said: some ten seconds."""
MOST_REFUSED = 200
"""Jobs that are asked for one that makes sense before any row is made."""
NUMBERS = (
    *("trainable_parameters", "requested_bytes", "peak_allocated", "peak_reserved", "gpu", "usable_bytes", "context_bytes"),
    *("needed_bytes", "headroom_bytes", "verdict", "decided_by", "error"),
)
"""Columns behind the options."""

Chunk = dict[str, list[Any]]
Progress = Callable[[str, float], None]


class Tally(NamedTuple):
    """How the verdicts of a sweep came about: rows by `BY`, points that were replayed, and seconds."""

    rows: int
    by: Mapping[str | None, int]
    replayed: int
    seconds: float


class Sweep:
    """The rows of a grid, evaluated while they are read: an iterable of dicts, as pandas and polars take them.

    A column is an option or one of `NUMBERS`; bytes are integers, None is what is not known. `peak_allocated`, `peak_reserved`
    and what follows from them are those of points that were replayed. `decided_by`: `requested`, where the bytes that tensors
    request already exceed the card; `bound`, where a bound on what the allocator reserves leaves enough
    (`planning.decided`); `replay`. Where the verdict is None, it would take more replays. `tally` is filled once all rows were
    read.
    """

    def __init__(self, grid: _Grid, cards: Sequence[Gpu], *, replays: int | None, progress: Progress | None) -> None:
        self._grid, self._cards, self._replays, self._progress = grid, cards, replays, progress
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(("model", "method", *grid.of_jobs(), *SIZES, *NUMBERS)))
        self.warnings: tuple[str, ...] = ()
        self.tally: Tally | None = None

    def __len__(self) -> int:
        return self._grid.num_points() * max(len(self._cards), 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for chunk in self.chunks():
            yield from (dict(zip(chunk, values, strict=True)) for values in zip(*chunk.values(), strict=True))

    def values_of(self, column: str) -> Values:
        """The values of an option that differs between points; empty for what does not."""
        named: Mapping[str, Values] = {"model": self._grid.models, "method": self._grid.methods, **self._grid.axes}
        return named.get(column, ())

    def records(self) -> list[dict[str, Any]]:
        """All rows."""
        return list(self)

    def chunks(self) -> Iterator[Chunk]:
        """The rows as columns, some ten thousand at a time: column → a list of values."""
        begin, rows, points, replayed = time.perf_counter(), 0, 0, 0
        by: Counter[str | None] = Counter()
        warnings: dict[str, None] = {}
        total = self._grid.num_points()
        for job in self._grid.jobs():
            for block in job.blocks(self._cards):
                points += block.count
                share = None if self._replays is None else self._replays * points // total - replayed
                for chunk in block.rows(self.columns, share, self._telling(rows)):
                    rows += len(chunk["model"])
                    by.update(chunk["decided_by"])
                    yield chunk
                replayed += block.replayed
                warnings |= dict.fromkeys(block.warnings)
        self.warnings = tuple(warnings)
        self.tally = Tally(rows, by, replayed, time.perf_counter() - begin)

    def _telling(self, rows: int) -> Callable[[int, float], None]:
        """Tells the progress: how many points of a block are behind, and what share of its replays."""
        if self._progress is None:
            return lambda points, share: None
        total, cards, tell = len(self), max(len(self._cards), 1), self._progress
        return lambda points, share: tell(f"{rows:,} of {total:,} rows", (rows + share * points * cards) / total)


def sweep(
    model: Any,
    *,
    gpu: Any = None,
    context: float | None = None,
    replays: int | None = REPLAYS,
    most_rows: int | None = MOST_ROWS,
    progress: Progress | None = None,
    **options: Any,
) -> Sweep:
    """A job at every point of a grid, on each card of `gpu`.

    `model` and each of `options` are a value as `estimate` takes it, a list or array of values, or a range (a Python range, or a
    text such as `512:8192:512`, which ends at its stop). An option that takes a list itself (`target_modules`) gets a list of
    lists. Fields of one method are left out for methods that have none of that name.

    `replays`: how many points are replayed at most where bytes alone do not tell the verdict; None: all of them. `most_rows`:
    raises RefusedError for a grid of more rows, before anything runs. `progress` is called with what is done and the share that
    is behind.

    Raises what `estimate` raises where no point of the grid makes sense; a combination that is refused has rows with `error`.
    """
    if replays is not None and (isinstance(replays, bool) or not isinstance(replays, int) or replays < 0):
        raise BoundError("replays", replays, "a whole number, at least 0")
    renamed = {
        MEANINGS[name].option if name in MEANINGS and not MEANINGS[name].values else name: value
        for name, value in options.items()
    }
    axes, single = separated({name: value for name, value in renamed.items() if value is not None})
    models = values_of("model", model)
    models = (model,) if models is None else models
    methods = known_methods(axes.pop("method") if "method" in axes else single.pop("method", "lora") or "lora", "method")
    if single.get("peft_config") is not None and "method" not in renamed:
        methods = ("",)
    cards = find_cards(gpu, context=context)
    grid = _Grid(models, methods, axes, single)
    rows = grid.num_points() * max(len(cards), 1)
    if most_rows is not None and rows > most_rows:
        of_cards = f" on {len(cards):,} cards" if len(cards) > 1 else ""
        raise RefusedError(f"the grid has {grid.text()}{of_cards} = {rows:,} rows; accepted at once: up to {most_rows:,}")
    for name, values in axes.items():
        grid.check(name, values)
    _first_of(islice(grid.jobs(), MOST_REFUSED))
    return Sweep(grid, cards, replays=replays, progress=progress)


class _Grid(NamedTuple):
    models: Values
    methods: Sequence[str]
    axes: Mapping[str, Values]
    single: Mapping[str, Any]

    def own(self, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a method has; all of them where it is the only one, to be refused."""
        return options_for(method, options) if len(self.methods) > 1 else dict(options)

    def num_points(self) -> int:
        """Points."""
        per_model = sum(prod(len(values) for values in self.own(method, self.axes).values()) for method in self.methods)
        return len(self.models) * per_model

    def text(self) -> str:
        """The axes and how many values each has."""
        named: dict[str, Sequence[Any]] = {"model": self.models, "method": self.methods, **self.axes}
        return " × ".join(f"{name.replace('_', ' ')} {len(values):,}" for name, values in named.items() if len(values) > 1)

    def of_jobs(self) -> list[str]:
        """The options that differ between jobs."""
        return [name for name in self.axes if name not in SIZES]

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

    def _any_job(self, changed: Mapping[str, Any]) -> None:
        """Check a job of the first method that has these options, or that refuses them if none has."""
        method = next((method for method in self.methods if changed.keys() <= self.own(method, changed).keys()), self.methods[0])
        named = {"method": method} if method else {}
        counted(self.models[0], **{**self.own(method, self.single), **changed, **named})

    def jobs(self) -> Iterator[_Job]:
        """One for each model, method, and combination of the options that are no sizes."""
        for model, method in product(self.models, self.methods):
            axes = self.own(method, self.axes)
            sizes = {name: axes.pop(name) for name in SIZES if name in axes}
            single = self.own(method, self.single) | ({"method": method} if method else {})
            for values in product(*axes.values()):
                shown = dict(zip(axes, values, strict=True))
                yield _Job(model, method, {**single, **shown}, shown, sizes)


class _Job(NamedTuple):
    """A job with the sizes that its points take. `shown`: the options that differ between jobs."""

    model: Any
    method: str
    options: Mapping[str, Any]
    shown: Mapping[str, Any]
    sizes: Mapping[str, Values]

    def __len__(self) -> int:
        return prod(len(values) for values in self.sizes.values())

    def counted(self, rank: int | None = None) -> Inventory:
        """The job with its parameters, at its own rank or another."""
        return counted(self.model, **self.options, **({} if rank is None else {"r": rank}))

    def blocks(self, cards: Sequence[Gpu]) -> Iterator[_Block]:
        """Its points, so many at a time."""
        ranks = self.sizes.get("r", ())
        by_kernels: dict[Any, Sized | str] = {}
        for card in cards or (None,):
            compute_capability = capability(card)
            key = kernels(compute_capability)
            if key not in by_kernels:
                try:
                    by_kernels[key] = Sized(self.counted, ranks, compute_capability=compute_capability)
                except PeftplanError as refused:
                    by_kernels[key] = str(refused)
        for start in range(0, len(self), BLOCK):
            yield _Block(self, start, min(BLOCK, len(self) - start), by_kernels, cards)


class _Block:
    """Some of a job's points, on all cards."""

    def __init__(self, job: _Job, start: int, count: int, by_kernels: Mapping[Any, Sized | str], cards: Sequence[Gpu]) -> None:
        self.job, self.start, self.count, self.by_kernels, self.cards = job, start, count, by_kernels, cards
        self.replayed = 0
        first = next(iter(by_kernels.values()))
        self.first = None if isinstance(first, str) else first.first.job
        self.warnings = self.first.warnings if self.first else ()

    def points(self) -> dict[str, Any]:
        """The sizes of the points, as arrays."""
        shape = [len(values) for values in self.job.sizes.values()]
        places = np.unravel_index(np.arange(self.start, self.start + self.count), shape) if shape else ()
        at = {name: _taken(name, values, place) for (name, values), place in zip(self.job.sizes.items(), places, strict=True)}
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
                chunk[name] = np.repeat(values[part], cards).tolist()
            for name, by_card in arrays.items():
                chunk[name] = [value for values in zip(*(each[part] for each in by_card), strict=True) for value in values]
            if errors is not None:
                chunk["error"] = [error for error in errors[part] for _ in range(cards)]
            yield chunk

    def _facts(self) -> dict[str, Any]:
        """Columns that are the same at all points."""
        if self.first is None:
            return {"model": _name(self.job.model), "method": self.job.method}
        rank = getattr(self.first.config, "r", None)
        facts = {"model": self.first.architecture.name, "method": self.first.method_name}
        return facts | ({"r": rank} if isinstance(rank, int) else {})

    def _evaluated(
        self, at: Mapping[str, Any], replays: int | None, tell: Callable[[int, float], None]
    ) -> tuple[dict[str, list[list[Any]]], list[str | None] | None]:
        """Column → a list of values for each card; and what is wrong with points, if anything is."""
        first = next(iter(self.by_kernels.values()))
        if isinstance(first, str):
            return {}, [first] * self.count
        points = Points(at["batch_size"], at["seq_len"], at.get("r"))
        errors, good = _refused(first, points)
        columns: dict[str, list[list[Any]]] = {}
        if not len(good):
            return {}, errors
        groups: dict[Any, list[Gpu]] = {}
        for card in self.cards:
            groups.setdefault(kernels(capability(card)), []).append(card)
        share = None if replays is None else replays // max(len(groups), 1)
        by_card: dict[str, dict[str, list[Any]]] = {}
        for key, sized in self.by_kernels.items():
            if isinstance(sized, str):
                continue
            try:
                values = self._of_kernels(sized, points.take(good), groups.get(key, []), share, tell)
            except PeftplanError as missing:
                return {}, [f"{missing}{getattr(missing, 'hint', '')}"] * self.count
            by_card |= values
        for on_card in [card.id for card in self.cards] or [""]:
            for name, column in by_card[on_card].items():
                columns.setdefault(name, []).append(_scattered(column, good, self.count))
        return columns, errors

    def _of_kernels(
        self, sized: Sized, points: Points, cards: Sequence[Gpu], replays: int | None, tell: Callable[[int, float], None]
    ) -> dict[str, dict[str, list[Any]]]:
        """Card → column → values, for cards that run the same kernels."""
        requested = np.maximum.reduce(list(sized.requested(points).values()))
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


def _on_card(card: Limits, number: int, decided: Decided) -> dict[str, list[Any]]:
    count = len(decided.reserved)
    needed = [None if reserved < 0 else reserved + card.context for reserved in decided.reserved.tolist()]
    return {
        "gpu": [card.card.id] * count,
        "usable_bytes": [card.usable] * count,
        "context_bytes": [card.context] * count,
        "needed_bytes": needed,
        "headroom_bytes": [None if n is None else card.usable - n for n in needed],
        "verdict": list(map(WORDS.__getitem__, decided.verdicts[number].tolist())),
        "decided_by": list(map(BY.__getitem__, decided.by[number].tolist())),
    }


def counted(model: Any, **options: Any) -> Inventory:
    """A checked job with its parameters and what lasts. Raises what `estimate` raises."""
    job = prepare(model, **options)
    check_rank_allocator(job)
    return inventory(job)


def _taken(name: str, values: Values, places: Any) -> Any:
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


def _first_of(jobs: Iterable[_Job]) -> None:
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


def _refused(sized: Sized, points: Points) -> tuple[list[str | None] | None, Any]:
    """What is wrong with points, if anything is, and the points with which nothing is."""
    job = sized.first.job
    most, least = job.architecture.max_positions, job.setup.logits_to_keep
    long = points.seq_len > most if most is not None else np.zeros(len(points), dtype=bool)
    short = points.seq_len < least if least is not None else np.zeros(len(points), dtype=bool)
    if not (long | short).any():
        return None, np.arange(len(points))
    errors: list[str | None] = [None] * len(points)
    for at in np.flatnonzero(long | short).tolist():
        try:
            check_length(int(points.seq_len[at]), most)
            check_logits_to_keep(least, int(points.seq_len[at]))
        except InputError as error:
            errors[at] = str(error)
    return errors, np.flatnonzero(~(long | short))


def _known(values: Any) -> list[int | None]:
    return [None if value < 0 else value for value in values.tolist()]


def _scattered(values: list[Any], where: Any, count: int) -> list[Any]:
    """Values at some of `count` places, None at the others."""
    if len(values) == count:
        return values
    column: list[Any] = [None] * count
    for at, value in zip(where.tolist(), values, strict=True):
        column[at] = value
    return column


def _name(model: object) -> str:
    return model if isinstance(model, str) else str(getattr(model, "name_or_path", "") or type(model).__name__)
