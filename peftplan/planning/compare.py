"""`compare`: one job by several methods on several cards, over several numbers of GPUs: a row for each combination."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from peftplan.distributed.names import DEFAULT, STRATEGIES
from peftplan.errors import BoundError, InputError, MissingExtraError, PeftplanError, UnknownNameError
from peftplan.frames import as_html, dataframe
from peftplan.job.launch import FILES, launch_options
from peftplan.job.prepare import prepare
from peftplan.job.setup import Engine
from peftplan.ledger import EVERY_CATEGORY
from peftplan.methods import METHODS
from peftplan.planning.assumed import NO_PICTURES
from peftplan.planning.estimate import estimate
from peftplan.planning.for_method import base_of, job_options, known_methods, options_for, without_formula
from peftplan.planning.serving import serving
from peftplan.planning.verdicts import counted_cards
from peftplan.results.estimate import SCHEMA_VERSION, Estimate
from peftplan.results.peaks import Peaks
from peftplan.validation import listed

if TYPE_CHECKING:
    from pandas import DataFrame
    from typing_extensions import Unpack

    from peftplan.job.options import JobOptions, Options
    from peftplan.planning.documents import CompareDocument, ComparedRow

COMPARED = ("lora", "dora", "qlora", "full")
"""Methods that are compared where none is named."""
OF_WAYS = ("strategy", "world_size")
"""What rows say only where several ways to share the job are compared."""
NOT_SERVED = frozenset({"training_args", "optim", "optim_args", "optim_target_modules", "script"})
"""Training options that do not affect the adapter file."""


class Compared(NamedTuple):
    """A method on a card; without a card, the method alone.

    Bytes are None where they are not known; `error` says why a method has no numbers.
    """

    method: str
    gpu: str | None = None
    trainable_parameters: int | None = None
    peak_allocated: int | None = None
    peak_phase: str | None = None
    by_category: Mapping[str, int] | None = None
    needed_bytes: int | None = None
    needed_is_lower_bound: bool = False
    """True if there is no peak: `needed_bytes` are then the persistent bytes."""
    usable_bytes: int | None = None
    headroom_bytes: int | None = None
    verdict: str | None = None
    adapter_bytes: int | None = None
    error: str | None = None
    reason: str | None = None
    """Why a method does not run on the card."""
    warnings: tuple[str, ...] = ()
    strategy: str | None = None
    """How GPUs share the job, where several ways are compared; None on one."""
    world_size: int | None = None
    """How many GPUs, where several ways are compared."""
    needed_is_upper_bound: bool = False
    """Whether `needed_bytes` have a margin, since reserved bytes are not known."""


class Comparison(NamedTuple):
    """Rows in the order in which methods and cards were typed."""

    model: str
    rows: tuple[Compared, ...]
    engine: str = "analytic"
    over: str | None = None
    """How several GPUs share each job; its numbers are then those of the GPU that needs most. None where rows say it."""

    @property
    def of_ways(self) -> bool:
        """Whether strategies, or numbers of GPUs, are compared."""
        return any(row.world_size for row in self.rows)

    def to_dict(self) -> CompareDocument:
        """The JSON, bytes as integers."""
        rows = [{**self._facts(row), "warnings": list(row.warnings)} for row in self.rows]
        document = {"schema_version": SCHEMA_VERSION, "engine": self.engine, "model": self.model, "rows": rows}
        return cast("CompareDocument", document | ({"over": self.over} if self.over else {}))

    def records(self) -> list[ComparedRow]:
        """Flat rows, which pandas and polars accept: one column for each category that any row has."""
        categories = [name for name in EVERY_CATEGORY if any(name in (row.by_category or {}) for row in self.rows)]
        rows = [
            {name: value for name, value in self._facts(row).items() if name not in ("by_category", "warnings")}
            | {"warnings": "; ".join(row.warnings)}
            | {name: None if row.by_category is None else row.by_category.get(name, 0) for name in categories}
            for row in self.rows
        ]
        return cast("list[ComparedRow]", rows)

    def _facts(self, row: Compared) -> dict[str, object]:
        bounded = any(each.needed_is_upper_bound for each in self.rows)
        left_out = (*(() if self.of_ways else OF_WAYS), *(() if bounded else ("needed_is_upper_bound",)))
        return {name: value for name, value in row._asdict().items() if name not in left_out}

    def to_dataframe(self) -> DataFrame:
        """`records()` as a pandas DataFrame."""
        return dataframe(self.records())

    def _repr_html_(self) -> str:
        return as_html(self)


def compare(
    model: object = None,
    *,
    methods: str | Sequence[str] = COMPARED,
    gpu: str | Sequence[str] | None = None,
    strategies: str | Sequence[str] = (),
    engine: Engine = "analytic",
    progress: Callable[[str, float], None] | None = None,
    **options: Unpack[JobOptions],
) -> Comparison:
    """What a job needs with each of `methods` on each card of `gpu`; options as for `estimate`.

    `strategies`: several ways in which GPUs share the job, over as many GPUs as `gpu` counts (`2xl4,8xl4`) or as `gpus` says.
    Each has rows of its own.

    A field of one method (`r`) is left out for methods without such a field. With a `peft_config`, the first rows are that
    adapter; methods of its peft type take its fields, the others only `options`. If the model, the quantization or another option
    does not allow a method, its row has an `error`. With `engine="trace"` each method is traced.

    Raises UnknownNameError for an unknown method, and what `estimate` raises if no method is possible.
    """
    model = base_of(options.get("peft_config")) if model is None else model
    ways = _ways(gpu, strategies, options)
    jobs = [(*job, way) for job in _jobs(model, known_methods(methods), options).items() for way in ways]
    rows: list[Compared] = []
    errors: list[PeftplanError] = []
    name, over = "", None
    for done, (method, fields, way) in enumerate(jobs):
        told = _telling(progress, method, done, len(jobs))
        try:
            result = estimate(model, gpu=way.cards, engine=engine, progress=told, **job_options(fields, way.options))
        except PeftplanError as error:
            errors.append(error)
            rows.append(way.named(Compared(method, error=str(error)), len(ways)))
            continue
        name = result.model["name"]
        shared = result.distributed and result.distributed.strategy
        over = shared.called if shared and len(ways) == 1 else None
        if shared:  # which may be that of a file
            way = way._replace(gpus=shared.world_size, strategy=shared.strategy)
        rows += [way.named(row, len(ways)) for row in _rows(method, result, _adapter_bytes(model, fields))]
    if errors and len(errors) == len(jobs):
        raise errors[0]
    for refused in errors:
        takers = sum(isinstance(refused, BoundError) and refused.field in fields for _, fields, _ in jobs)
        if takers and takers == sum(str(other) == str(refused) for other in errors):
            raise refused  # a value that no method takes that has such an option
    return Comparison(name, tuple(rows), engine, over)


class _Way(NamedTuple):
    """Cards, and the options that say how many of each share a job, and how."""

    cards: tuple[str, ...] | None
    options: Mapping[str, object]
    gpus: int
    strategy: str | None

    def named(self, row: Compared, ways: int) -> Compared:
        """A row that says how its GPUs share the job, if there are several ways."""
        return row._replace(strategy=self.strategy, world_size=self.gpus) if ways > 1 else row


def _ways(gpu: str | Sequence[str] | None, strategies: str | Sequence[str], options: JobOptions) -> list[_Way]:
    """Every strategy over every number of GPUs. Raises InputError or UnknownNameError."""
    names = tuple(dict.fromkeys(name for name in cast("Sequence[str]", listed(strategies)) if name)) or (None,)
    for name in names:
        if name is not None and name not in STRATEGIES:
            raise UnknownNameError("strategy", name, tuple(STRATEGIES))
    groups: list[tuple[int | None, tuple[str, ...]]] = counted_cards(gpu) or [(None, ())]
    number, own = options.get("gpus"), options.get("strategy")
    if number is not None and (counted := next((count for count, _ in groups if count), None)):
        raise InputError("gpus", number, f"gpu says how many there are ({counted}x…); accepted: one of the two")
    if own is not None and names != (None,):
        raise InputError("strategy", own, "strategies says which there are; accepted: one of the two")
    of_files, _ = launch_options({name: options.get(name) for name in FILES})
    settings: dict[str, object] = {**of_files, **{name: value for name, value in options.items() if value is not None}}
    ways: list[_Way] = []
    for name in names:
        for count, cards in groups:
            shared = ({} if name is None else {"strategy": name}) | ({} if count is None else {"gpus": count})
            ranks = (count or _number(settings.get("gpus"))) * _number(settings.get("nodes"))
            called = name or cast("str | None", settings.get("strategy")) or (DEFAULT if ranks > 1 else None)
            ways.append(_Way(cards or None, shared, ranks, called))
    return ways


def _number(value: object) -> int:
    """How many GPUs or nodes an option says, on the command line as text; 1 where it is refused later."""
    return int(value) if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else 1


def _jobs(model: object, names: Sequence[str], options: JobOptions) -> dict[str, JobOptions]:
    """Method → the options of its job, the adapter of a `peft_config` first."""
    if options.get("peft_config") is None:
        return {name: job_options(options_for(name, options), {"method": name}) for name in names}
    of_adapter = prepare(model, **options)
    jobs = {of_adapter.method_name.replace("_", "-"): options}
    fields = of_adapter.request.adapter or {}
    for name in names:
        if name in jobs:
            continue
        method = METHODS.get(name)
        if method is not None and method.peft_type is not None and method.peft_type == fields.get("peft_type"):
            jobs[name] = job_options(options, {"method": name, "peft_config": _unnamed(fields)})
        else:
            without = {key: value for key, value in options.items() if key != "peft_config"}
            jobs[name] = job_options(options_for(name, without), {"method": name})
    return jobs


def _unnamed(adapter: Mapping[str, object]) -> dict[str, object]:
    """An adapter config without the fields that make it one method of its peft type, such as `use_dora`."""
    naming = {field for method in METHODS.values() for field in method.defaults} - {"target_modules"}
    return {name: value for name, value in adapter.items() if name not in naming}


def _telling(
    progress: Callable[[str, float], None] | None, method: str, done: int, count: int
) -> Callable[[str, float], None] | None:
    """The progress of one method among `count`."""
    if progress is None:
        return None
    return lambda what, share: progress(f"{method}: {what}", (done + share) / count)


def _of_peak(peaks: Peaks) -> tuple[str, ...]:
    """What a peak leaves out."""
    without = tuple(f"the peak is a lower bound: {what}" for what in peaks.incomplete)
    return (*without, NO_PICTURES) if peaks.scope else without


def _rows(method: str, result: Estimate, adapter_bytes: int | None) -> list[Compared]:
    peaks = result.peaks
    by_category: dict[str, int] | None = (
        {category: size for category, size in result.ledger.by_category().items() if size} if peaks else None
    )
    shared = Compared(
        method,
        trainable_parameters=result.trainable_parameters,
        peak_allocated=peaks.allocated if peaks else None,
        peak_phase=peaks.phase if peaks else None,
        by_category=by_category if peaks else None,
        adapter_bytes=adapter_bytes,
        warnings=(*result.warnings, *_of_peak(peaks)) if peaks else result.warnings,
        error=None if peaks else without_formula(result),
    )
    return [
        shared._replace(
            gpu=card.gpu,
            needed_bytes=card.needed_bytes,
            needed_is_lower_bound=card.lower_bound,
            needed_is_upper_bound=card.upper_bound,
            usable_bytes=card.usable_bytes,
            headroom_bytes=card.headroom_bytes,
            verdict=card.verdict,
            reason=card.reason,
        )
        for card in result.gpus
    ] or [shared]


def _adapter_bytes(model: object, options: JobOptions) -> int | None:
    """The adapter's file; None where the method writes none, or only peft knows it."""
    fields = cast("Options", {name: value for name, value in options.items() if name not in NOT_SERVED})
    try:
        file = serving(model, **fields).file
    except (PeftplanError, MissingExtraError):
        return None
    return file.num_bytes if file else None
