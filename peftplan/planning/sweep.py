"""`sweep`: a job at every point of a grid over any of its options, on any cards, as a stream of rows.

Batch sizes, sequence lengths and ranks are evaluated as arrays, other options job by job. Memory is bounded by a block of points,
however large the grid is. `planning.decided` says how verdicts come about.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, cast

from peftplan.errors import BoundError, InputError, MissingExtraError, RefusedError
from peftplan.job.words import MEANINGS
from peftplan.planning.axes import Values, separated, values_of
from peftplan.planning.estimate import cards_and_number, number_of_gpus
from peftplan.planning.for_method import ONE_POINT, base_of, known_methods
from peftplan.planning.sweep_grid import MOST_REFUSED, SIZES, Grid, first_of
from peftplan.planning.sweep_points import Chunk, blocks
from peftplan.planning.verdicts import find_cards

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from peftplan.hardware.gpus import Gpu
    from peftplan.job.grid_options import GridOptions
    from peftplan.planning.documents import SweepRow

MOST_ROWS = 10_000_000
"""Rows that are made without being asked twice."""
REPLAYS = 2000
"""Points that are replayed, where nothing else is said: some ten seconds."""
NUMBERS = (
    *("trainable_parameters", "requested_bytes", "peak_allocated", "peak_reserved", "gpu", "usable_bytes", "context_bytes"),
    *("needed_bytes", "headroom_bytes", "verdict", "decided_by", "error"),
)
"""Columns behind the options."""

Progress = Callable[[str, float], None]


class Tally(NamedTuple):
    """How the verdicts of a sweep came about: rows by `BY`, rows with an `error`, points that were replayed, and seconds."""

    rows: int
    by: Mapping[str | None, int]
    refused: int
    replayed: int
    seconds: float


class Sweep:
    """The rows of a grid, evaluated while they are read: an iterable of dicts, which pandas and polars accept.

    A column is an option or one of `NUMBERS`; bytes are integers, None is what is not known. `peak_allocated`, `peak_reserved`
    and what follows from them are those of points that were replayed. `decided_by`: `requested`, where the bytes that tensors
    request already exceed the card; `bound`, where a bound on what the allocator reserves leaves enough
    (`planning.decided`); `replay`. If the verdict is None, more replays would decide it. `tally` is filled once all rows were
    read.
    """

    def __init__(self, grid: Grid, cards: Sequence[Gpu], *, replays: int | None, progress: Progress | None) -> None:
        self._grid, self._cards, self._replays, self._progress = grid, cards, replays, progress
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(("model", "method", *grid.of_jobs(), *SIZES, *NUMBERS)))
        self.warnings: tuple[str, ...] = ()
        self.tally: Tally | None = None

    @property
    def num_rows(self) -> int:
        """Rows; polars takes no iterable that has a length itself."""
        return self._grid.num_points() * max(len(self._cards), 1)

    def __repr__(self) -> str:
        of_cards = f" on {', '.join(card.id for card in self._cards)}" if self._cards else ""
        rows = f"{self.num_rows:,} row{'' if self.num_rows == 1 else 's'}"
        return f"<Sweep of {self._grid.text() or '1 point'}{of_cards}: {rows}, evaluated while they are read>"

    def __iter__(self) -> Iterator[SweepRow]:
        for chunk in self.chunks():
            rows = (dict(zip(chunk, values, strict=True)) for values in zip(*chunk.values(), strict=True))
            yield from cast("Iterator[SweepRow]", rows)

    @property
    def __arrow_c_stream__(self) -> Callable[..., object]:
        """The rows under one schema, for polars and other readers of Arrow's PyCapsule interface, where pyarrow is installed."""
        try:
            from peftplan.planning import sweep_arrow
        except MissingExtraError as error:
            raise AttributeError(str(error)) from None
        stream: Callable[..., object] = sweep_arrow.reader(self).__arrow_c_stream__
        return stream

    def values_of(self, column: str) -> Values:
        """The values of an option that differs between points; empty for what does not."""
        by_name: Mapping[str, Values] = {"model": self._grid.models, "method": self._grid.methods, **self._grid.axes}
        return by_name.get(column, ())

    def records(self) -> list[SweepRow]:
        """All rows."""
        return list(self)

    def chunks(self) -> Iterator[Chunk]:
        """The rows as columns, some ten thousand at a time: column → a list of values."""
        begin, rows, refused, points, replayed = time.perf_counter(), 0, 0, 0, 0
        by: Counter[str | None] = Counter()
        warnings: dict[str, None] = {}
        total = self._grid.num_points()
        for job in self._grid.jobs():
            for block in blocks(job, self._cards):
                points += block.count
                share = None if self._replays is None else self._replays * points // total - replayed
                for chunk in block.rows(self.columns, share, self._telling(rows)):
                    rows += len(chunk["model"])
                    by.update(None if rule is None else str(rule) for rule in chunk["decided_by"])
                    refused += len(chunk["error"]) - chunk["error"].count(None)
                    yield chunk
                replayed += block.replayed
                warnings |= dict.fromkeys(block.warnings)
        self.warnings = tuple(warnings)
        by[None] -= refused
        self.tally = Tally(rows, by, refused, replayed, time.perf_counter() - begin)

    def _telling(self, rows: int) -> Callable[[int, float], None]:
        """Tells the progress: how many points of a block are behind, and what share of its replays."""
        if self._progress is None:
            return lambda points, share: None
        total, cards, tell = self.num_rows, max(len(self._cards), 1), self._progress
        return lambda points, share: tell(f"{rows:,} of {total:,} rows", (rows + share * points * cards) / total)


def sweep(
    model: object = None,
    *,
    gpu: str | Iterable[str] | None = None,
    context: float | None = None,
    engine: str = "analytic",
    replays: int | None = REPLAYS,
    most_rows: int | None = MOST_ROWS,
    progress: Progress | None = None,
    **options: Unpack[GridOptions],
) -> Sweep:
    """A job at every point of a grid, on each card of `gpu`.

    `model` and each of `options` is a value as for `estimate`, a list or array of values, or a range: a Python range, or a string
    such as `512:8192:512`, which includes its stop. An option that takes a list itself (`target_modules`) takes a list of lists.
    Without `model`, each `peft_config` names its base model. Fields of one method are left out for methods without such a field.

    `engine`: only `analytic`; a trace counts one point at a time. `replays`: the most points that are replayed, if the bytes of
    the tensors do not decide the verdict; None: all of them. `most_rows`: raises RefusedError for a larger grid, before
    anything runs. `progress` is called with the current stage and the share that is done.

    Raises what `estimate` raises if no point of the grid is possible; a combination that is not possible has rows with `error`.
    """
    if replays is not None and (isinstance(replays, bool) or not isinstance(replays, int) or replays < 0):
        raise BoundError("replays", replays, "a whole number, at least 0")
    renamed = {
        MEANINGS[name].option if name in MEANINGS and not MEANINGS[name].values else name: value
        for name, value in options.items()
    }
    if engine != "analytic":
        raise InputError("engine", engine, f"accepted: analytic; {ONE_POINT}")
    axes, single = separated({name: value for name, value in renamed.items() if value is not None})
    if model is None and "peft_config" not in axes:
        model = base_of(single.get("peft_config"))
    models = values_of("model", model)
    models = (model,) if models is None else models
    methods = known_methods(axes.pop("method") if "method" in axes else single.pop("method", "lora") or "lora", "method")
    if renamed.get("peft_config") is not None and "method" not in renamed:
        methods = ("",)
    names, count = cards_and_number(gpu)
    single.update(number_of_gpus(count, renamed))
    cards = find_cards(names, context=context)
    grid = Grid(models, methods, axes, single)
    rows = grid.num_points() * max(len(cards), 1)
    if most_rows is not None and rows > most_rows:
        of_cards = f" on {len(cards):,} cards" if len(cards) > 1 else ""
        raise RefusedError(f"the grid has {grid.text()}{of_cards} = {rows:,} rows; accepted at once: up to {most_rows:,}")
    for name, values in axes.items():
        grid.check(name, values)
    first_of(islice(grid.jobs(), MOST_REFUSED))
    return Sweep(grid, cards, replays=replays, progress=progress)
