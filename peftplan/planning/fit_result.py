"""What `fit` returns: plans, each a job with its largest size, and why it cannot be larger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

from peftplan.frames import as_html, dataframe
from peftplan.ledger import Line
from peftplan.planning.assumed import NO_PICTURES
from peftplan.planning.largest import Largest
from peftplan.results.estimate import Estimate, Origin
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

    from peftplan.planning.documents import FitDocument, PlanDocument, PlanRow

SCHEMA_VERSION = 1
CEILINGS = {"batch_size": 2**16, "seq_len": 2**22, "r": 2**14}
"""Upper limits of the searches: no job is that large."""


class Binding(NamedTuple):
    """What keeps a plan from the next larger size: how much is missing there, when, and the line that grew most on the way."""

    phase: str
    category: str
    line: str
    line_bytes: int
    verdict: str
    headroom_bytes: int

    @classmethod
    def of(cls, here: Estimate, beyond: Estimate) -> Binding:
        """`here` fits and `beyond` does not; the two are one estimate where nothing fits, and the largest line is named."""
        assert here.peaks is not None
        assert beyond.peaks is not None
        smaller: Iterable[Line] = here.peaks.ledgers[beyond.peaks.phase] if here is not beyond else ()
        before = {(line.category, line.name): line.bytes() for line in smaller}

        def growth(line: Line) -> int:
            return line.bytes() - before.get((line.category, line.name), 0)

        line = max((line for line in beyond.ledger if line.place == "device"), key=growth)
        (card,) = beyond.gpus
        name = line.name.replace("{}", "*")
        return cls(beyond.peaks.phase, line.category, name, line.bytes(), card.verdict, card.headroom_bytes)

    def text(self, *, grows: bool = True) -> str:
        """In words: `1.20 GiB short in backward; grows most: logits, 5.87 GiB (log_softmax)`.

        `grows`: whether the line is the one that grew most; it is the largest one where there is no smaller size.
        """
        room = f"{format_bytes(abs(self.headroom_bytes))} {'short' if self.headroom_bytes < 0 else 'left'} in {self.phase}"
        if self.verdict == "tight" and self.headroom_bytes < 0:
            room += " unless torch releases cached memory"
        line = f"{self.category.replace('_', ' ')}, {format_bytes(self.line_bytes)} ({self.line})"
        return f"{room}; {'grows most' if grows else 'largest'}: {line}"


class Plan(NamedTuple):
    """A job with its largest size. `size` is 0 where nothing fits; the numbers are then those of the smallest size.

    `changes`: options that differ from the job as typed, besides the size. `fits_again`: the largest size beyond that fits,
    where reserved bytes are not monotone. `asked_from`: every size from here to the answer was checked individually
    (`planning.largest`). `bounded`: the search ended before the card was full.
    """

    size: int
    method: str
    batch_size: int
    seq_len: int
    r: int | None
    trainable_parameters: int
    peak_allocated: int
    needed_bytes: int
    usable_bytes: int
    headroom_bytes: int
    verdict: str
    reason: str | None
    context_bytes: int
    context_assumed: bool
    changes: Mapping[str, object]
    binding: Binding | None
    fits_again: int | None
    asked_from: int
    bounded: bool
    model: str
    assumptions: Mapping[str, object]
    warnings: tuple[str, ...]
    next_larger: str | None = None
    """The next larger batch size or model, which does not fit. Where models were searched, `size` counts parameters."""
    next_is_known: bool = True
    """Whether the next larger size has a verdict; where it has none, `warnings` says why."""
    origin: Origin | None = None
    """The job and its card, as data; `peftplan.export` writes them into another tool's config."""

    @classmethod
    def of(cls, result: Estimate, edge: Largest, *, size: str, changes: Mapping[str, object], binding: Binding | None) -> Plan:
        """The plan of an estimate at its largest size, or at the smallest where its size is 0."""
        assert result.peaks is not None
        (card,) = result.gpus
        rank = result.method["config"].get("r")
        return cls(
            size=edge.size,
            method=result.method["name"],
            batch_size=result.assumptions["batch_size"],
            seq_len=result.assumptions.get("seq_len", 0),
            r=rank if isinstance(rank, int) else None,
            trainable_parameters=result.trainable_parameters,
            peak_allocated=result.peaks.allocated,
            needed_bytes=card.needed_bytes,
            usable_bytes=card.usable_bytes,
            headroom_bytes=card.headroom_bytes,
            verdict=card.verdict,
            reason=card.reason,
            context_bytes=card.context_bytes,
            context_assumed=card.context_assumed,
            changes={**changes},
            binding=binding,
            fits_again=edge.again,
            asked_from=edge.asked_from,
            bounded=edge.bounded,
            model=result.model["name"],
            assumptions=result.assumptions,
            warnings=(*result.warnings, *([NO_PICTURES] if card.scope else [])),
            origin=result.origin,
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one micro batch on one card."""
        return self.batch_size * self.seq_len

    def to_dict(self, size: str) -> PlanDocument:
        """One entry of `plans`; if nothing fits, the searched size is 0 and the model None."""
        left_out = ["size", "model", "assumptions", "warnings", "next_is_known", "origin"]
        left_out += [] if size == "model" else ["next_larger"]
        facts = {name: value for name, value in self._asdict().items() if name not in left_out}
        facts["binding"] = None if self.binding is None else self.binding._asdict()
        largest = (self.model if self.size else None) if size == "model" else self.size
        return cast("PlanDocument", {**facts, size: largest, "tokens_per_step": self.tokens_per_step if self.size else 0})


class OtherCard(NamedTuple):
    """The smallest card of the catalogue that takes a job which no size makes fit; `changes` as those of a plan."""

    gpu: str
    model: str
    changes: Mapping[str, object]
    usable_bytes: int
    needed_bytes: int


class Fit(NamedTuple):
    """The plans of a job on one card: the first is the job as typed, the others are ranked; `nearest` are two that do not fit."""

    model: str
    gpu: str
    size: str
    plans: tuple[Plan, ...]
    nearest: tuple[Plan, ...]
    engine: str = "analytic"
    other_card: OtherCard | None = None
    """If no plan fits: the smallest card that can run the nearest plan, at the smallest size."""

    @property
    def fits(self) -> bool:
        """Whether the job as typed fits at any size."""
        return self.plans[0].size > 0

    def to_dict(self) -> FitDocument:
        """The JSON, bytes as integers."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "engine": self.engine,
            "model": self.model,
            "gpu": self.gpu,
            "max": self.size,
            "warnings": list(self.plans[0].warnings),
            "plans": [plan.to_dict(self.size) for plan in self.plans],
            "nearest": [plan.to_dict(self.size) for plan in self.nearest],
            "other_card": None if self.other_card is None else self.other_card._asdict(),
        }
        return cast("FitDocument", document)

    def records(self) -> list[PlanRow]:
        """One flat row per plan, which pandas and polars accept."""
        rows = []
        for plan in self.plans:
            changes = ", ".join(f"{name}={value}" for name, value in plan.changes.items())
            binding = plan.binding and plan.binding.text(grows=plan.size > 0)
            rows.append(cast("PlanRow", {**plan.to_dict(self.size), "changes": changes, "binding": binding}))
        return rows

    def to_dataframe(self) -> DataFrame:
        """`records()` as a pandas DataFrame."""
        return dataframe(self.records())

    def _repr_html_(self) -> str:
        return as_html(self)
