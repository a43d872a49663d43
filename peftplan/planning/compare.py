"""`compare`: one job by several methods on several cards, a row for each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from peftplan.errors import MissingExtraError, PeftplanError
from peftplan.frames import as_html, dataframe
from peftplan.planning.estimate import estimate
from peftplan.planning.for_method import known_methods, options_for, without_formula
from peftplan.planning.serving import serving
from peftplan.results.estimate import SCHEMA_VERSION, Estimate

if TYPE_CHECKING:
    from pandas import DataFrame
    from typing_extensions import Unpack

    from peftplan.job.options import JobOptions

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
    usable_bytes: int | None = None
    headroom_bytes: int | None = None
    verdict: str | None = None
    adapter_bytes: int | None = None
    error: str | None = None
    reason: str | None = None
    """Why a method does not run on the card."""
    warnings: tuple[str, ...] = ()


class Comparison(NamedTuple):
    """Rows in the order in which methods and cards were typed."""

    model: str
    rows: tuple[Compared, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON, bytes as integers."""
        return {"schema_version": SCHEMA_VERSION, "model": self.model, "rows": [row._asdict() for row in self.rows]}

    def records(self) -> list[dict[str, Any]]:
        """Flat rows, as pandas and polars take them."""
        return [
            {name: value for name, value in row._asdict().items() if name not in ("by_category", "warnings")}
            | {"warnings": "; ".join(row.warnings)}
            | dict(row.by_category or {})
            for row in self.rows
        ]

    def to_dataframe(self) -> DataFrame:
        """`records()` as a pandas DataFrame."""
        return dataframe(self.records())

    def _repr_html_(self) -> str:
        return as_html(self)


def compare(
    model: Any, *, methods: str | Sequence[str], gpu: str | Sequence[str] | None = None, **options: Unpack[JobOptions]
) -> Comparison:
    """What a job needs by each of `methods` on each card of `gpu`; options as `estimate` takes them.

    A field of one method (`r`) is left out for methods that have none of that name. A method that the model, the quantization or
    another option refuses has a row with `error`. Raises UnknownNameError for an unknown method, and what `estimate` raises where
    every method is refused.
    """
    names = known_methods(methods)
    rows: list[Compared] = []
    errors: list[PeftplanError] = []
    name = ""
    for method in names:
        try:
            fields = options_for(method, options)
            result = estimate(model, method=method, gpu=gpu, **fields)
        except PeftplanError as error:
            errors.append(error)
            rows.append(Compared(method, error=str(error)))
            continue
        name = result.model["name"]
        rows += _rows(method, result, _adapter_bytes(model, method, fields))
    if errors and len(errors) == len(names):
        raise errors[0]
    return Comparison(name, tuple(rows))


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
        warnings=result.warnings,
        error=None if peaks else without_formula(result),
    )
    return [
        shared._replace(
            gpu=card.gpu,
            needed_bytes=card.needed_bytes,
            usable_bytes=card.usable_bytes,
            headroom_bytes=card.headroom_bytes,
            verdict=card.verdict,
            reason=card.reason,
        )
        for card in result.gpus
    ] or [shared]


def _adapter_bytes(model: Any, method: str, options: dict[str, Any]) -> int | None:
    """The adapter's file; None where the method writes none, or only peft knows it."""
    fields = {name: value for name, value in options.items() if name not in NOT_SERVED}
    try:
        file = serving(model, method=method, **fields).file
    except (PeftplanError, MissingExtraError):
        return None
    return file.num_bytes if file else None
