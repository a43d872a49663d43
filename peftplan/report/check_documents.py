"""The JSON of `peftplan check`: how far an engine is off the measured runs."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from peftplan.accuracy.engines import Figure
from peftplan.accuracy.records import SetupSaid


class CountsDocument(TypedDict):
    """Parameter counts that the runs printed."""

    printed: int
    equal: int


class SummaryDocument(TypedDict):
    """Drift of one peak in one group of runs, in percent; plus means that the prediction is too high."""

    group: str
    peak: Figure
    rows: int
    median_percent: float
    median_unsigned_percent: float
    """The median absolute error."""
    worst_percent: float
    worst_id: str
    wrong_verdicts: int
    within: dict[str, float]
    """Percent → share of the runs that are within it, 0 to 1."""


class FigureDocument(TypedDict):
    """One peak of a run, in bytes."""

    peak: Figure
    measured: int
    stated: int
    drift_percent: float


class CountDocument(TypedDict):
    """One parameter count, as the run printed it and as the engine states it."""

    printed: int | None
    stated: int | None


class RunDocument(TypedDict):
    """One measured run."""

    id: str
    file: str
    line: int
    source: str
    model: str
    method: str
    strategy: str | None
    """What divides the run over several GPUs; all else is then of one rank."""
    num_gpus: int
    exact: bool
    """Whether the record states everything that ran."""
    setup: SetupSaid
    """How much of the setup the source states."""
    refused: str | None
    """Why the engine states nothing."""
    figures: list[FigureDocument]
    trainable: CountDocument
    total: CountDocument
    verdict: str | None
    wrong_verdicts: dict[str, str]
    """Kind of card → the verdict that the measurement contradicts."""


class FailureDocument(TypedDict):
    """Why the command exits 1."""

    kind: str
    id: str
    file: str
    line: int
    what: str


class TotalsDocument(TypedDict):
    """Counts and drift of many runs."""

    records: int
    with_peak: int
    no_peak_stated: int
    refused: int
    counts: CountsDocument
    out_of_memory: dict[str, int]
    """Verdict → runs that ran out of memory on that card."""
    verdicts: dict[str, dict[Literal["wrong", "asked"], int]]
    """Kind of card → how many verdicts were wrong, of how many."""
    summary: dict[str, list[SummaryDocument]]
    """Grouping (source, method, model, strategy …) → groups."""


class CheckDocument(TotalsDocument):
    """An engine against measured runs. Counts and drift are those of runs on one GPU."""

    schema_version: Literal[1]
    engine: str
    several_gpus: TotalsDocument
    """The same of ranks of several GPUs."""
    rows: list[RunDocument]
    failures: list[FailureDocument]
