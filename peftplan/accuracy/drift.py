"""Drift: what an engine states against what was measured, figure by figure, and its summary over many runs.

Drift is signed, in percent of what was measured: stated ÷ measured − 1. Verdicts are asked of cards made for one run: 1 % below
its measured peak (`fits` is wrong there) and 10 % above it (`does_not_fit` is wrong there); and of the card it ran on, where
`does_not_fit` is wrong if the run went well, `fits` if it ran out of memory, and `does_not_run` in both cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from peftplan.accuracy.engines import OVERALL, Case, Figure, Stated
from peftplan.accuracy.records import Phase, Record, SetupSaid

WITHIN = (1, 3, 5)
"""Percent: the shares of a summary."""
BELOW, ABOVE = 0.99, 1.10
"""The two synthetic cards, as shares of the measured peak."""

VERDICTS = ("fits", "tight", "does_not_fit", "does_not_run")
"""Those that say something."""
CONTRADICTED = (("ok", "does_not_fit"), ("ok", "does_not_run"), ("oom", "fits"), ("oom", "does_not_run"))
"""Outcomes of a run, each with a verdict on its card that it proves wrong."""
Wrong = Literal["own", "below", "above"]


@dataclass(frozen=True)
class Compared:
    """One figure of one run, in bytes."""

    figure: Figure
    measured: int
    stated: int
    rounding: int = 0

    @property
    def drift(self) -> float:
        """Signed, in percent of what was measured."""
        return 100 * (self.stated - self.measured) / self.measured

    @property
    def slack(self) -> float:
        """Percent that the source's rounding leaves open: half its last digit."""
        return 50 * self.rounding / self.measured


@dataclass(frozen=True)
class Answer:
    """What one engine states of one case."""

    case: Case
    stated: Stated

    @property
    def record(self) -> Record:
        return self.case.record

    @property
    def compared(self) -> tuple[Compared, ...]:
        """Every figure that was both measured and stated."""
        rounding = self.record.peaks.rounding_bytes
        both = ((figure, measured, self.stated.figures.get(figure)) for figure, measured in measured_figures(self.record))
        return tuple(
            Compared(figure, measured, predicted, rounding) for figure, measured, predicted in both if predicted is not None
        )

    @property
    def overall(self) -> tuple[Compared, ...]:
        """Those that are peaks of the whole run."""
        return tuple(one for one in self.compared if one.figure in OVERALL)

    @property
    def bound(self) -> Compared | None:
        """Where no overall peak compares: the stated allocated bytes beside measured reserved or device bytes, which are more."""
        predicted = self.stated.figures.get("allocated")
        if self.overall or predicted is None:
            return None
        above = [(figure, size) for figure, size in measured_figures(self.record) if figure in ("reserved", "device")]
        return Compared(above[0][0], above[0][1], predicted, self.record.peaks.rounding_bytes) if above else None

    @property
    def miscounts(self) -> tuple[tuple[str, int, int], ...]:
        """(what, printed by the run, stated) of each count that differs."""
        counts = self.record.counts
        pairs = (("trainable", counts.trainable, self.stated.trainable), ("total", counts.total, self.stated.total))
        return tuple((what, printed, predicted) for what, printed, predicted in pairs if _differ(printed, predicted))  # type: ignore[misc]

    @property
    def wrong_verdicts(self) -> dict[Wrong, str]:
        """Verdicts that what was measured contradicts: on the card it ran on, and on cards just below and well above its peak."""
        return dict(_wrong(self))


def _differ(printed: int | None, predicted: int | None) -> bool:
    return printed is not None and predicted is not None and printed != predicted


def measured_figures(record: Record) -> Iterator[tuple[Figure, int]]:
    """What a record measured: overall peaks, then the allocated bytes of each phase.

    Of a run that ended early nothing: its counters stood still at what it had reached, which is not what it needs.
    """
    if record.outcome != "ok":
        return
    for metric in OVERALL:
        nbytes = record.peaks.figure(metric)  # type: ignore[arg-type]
        if nbytes:
            yield metric, nbytes
    phases: Iterable[Phase] = record.peaks.by_phase
    for phase in phases:
        nbytes = record.peaks.figure("allocated", phase)
        if nbytes:
            yield phase, nbytes


def _wrong(answer: Answer) -> Iterator[tuple[Wrong, str]]:
    own, outcome = answer.stated.verdict, answer.record.outcome
    if own is not None and (outcome, own) in CONTRADICTED:
        yield "own", own
    peak = next(iter(sorted(answer.overall, key=lambda one: ("reserved", "allocated", "device").index(one.figure))), None)
    if peak is not None:
        yield from _wrong_on_cards(peak)


def _wrong_on_cards(peak: Compared) -> Iterator[tuple[Wrong, str]]:
    if (below := synthetic_verdict(peak, share=BELOW)) == "fits":
        yield "below", below
    if (above := synthetic_verdict(peak, share=ABOVE)) == "does_not_fit":
        yield "above", above


def synthetic_verdict(peak: Compared, *, share: float) -> str:
    """What peftplan says of a card with `share` of the measured peak, asked with the stated one."""
    from peftplan.hardware.gpus import Gpu
    from peftplan.planning.verdicts import verdict
    from peftplan.results.peaks import Peaks

    card = Gpu(id="synthetic", name="synthetic", capacity_bytes=int(share * peak.measured), context_mib=0)
    return verdict(card, 0, Peaks(ledgers={}, reserved=peak.stated)).verdict


@dataclass(frozen=True)
class Summary:
    """Drift of one figure over the runs of one group."""

    group: str
    figure: Figure
    rows: int
    median: float
    median_unsigned: float
    worst: float
    worst_id: str
    within: tuple[float, ...]
    """Shares of the rows within `WITHIN` percent."""
    wrong: int
    """Rows with a wrong verdict, by this figure, on one of the two cards made for them."""


MARKS: dict[SetupSaid, str] = {
    "as labelled": "",
    "with an inferred stack": " (inferred stack)",
    "leaves something open": " (open)",
}
"""What follows a source's name, so that its runs are summed up apart."""
GROUPINGS: dict[str, Callable[[Record], str]] = {
    "strategy": lambda record: (
        f"{record.run.strategy}, {record.circumstances.num_gpus} GPUs, {record.run.method_name}" + MARKS[record.setup]
    ),
    "source": lambda record: record.circumstances.source + MARKS[record.setup],
    "method": lambda record: record.run.method_name,
    "model": lambda record: record.run.model_name,
    "setup": lambda record: record.setup,
}

ON_ONE, ON_SEVERAL = ("source", "method", "model", "setup"), ("strategy", "source", "model")
"""Groupings of runs on one GPU, and of ranks."""


def apart(answers: Sequence[Answer]) -> tuple[list[Answer], list[Answer]]:
    """The runs on one GPU, and those of a rank of several."""
    sides: tuple[list[Answer], list[Answer]] = [], []
    for answer in answers:
        sides[answer.record.run.strategy is not None].append(answer)
    return sides


def summaries(answers: Sequence[Answer], by: str, figures: Sequence[Figure] = OVERALL) -> list[Summary]:
    """A summary per group and figure, groups in alphabetical order."""
    groups: dict[tuple[str, Figure], list[tuple[Compared, str]]] = {}
    for answer in answers:
        for one in answer.compared:
            if one.figure in figures:
                groups.setdefault((GROUPINGS[by](answer.record), one.figure), []).append((one, answer.record.id))
    order = sorted(groups, key=lambda key: (key[0].lower(), figures.index(key[1])))
    return [_summary(group, figure, groups[group, figure]) for group, figure in order]


def _summary(group: str, figure: Figure, rows: Sequence[tuple[Compared, str]]) -> Summary:
    drifts = [one.drift for one, _ in rows]
    worst, worst_id = max(rows, key=lambda row: abs(row[0].drift))
    within = tuple(sum(abs(drift) <= limit for drift in drifts) / len(rows) for limit in WITHIN)
    wrong = sum(bool(dict(_wrong_on_cards(one))) for one, _ in rows)
    return Summary(group, figure, len(rows), median(drifts), median(map(abs, drifts)), worst.drift, worst_id, within, wrong)


@dataclass(frozen=True)
class Totals:
    """What a check did with its records, and how many verdicts were asked and wrong."""

    records: int
    with_peak: int
    no_peak: int
    refused: int
    out_of_memory: dict[str, int]
    """Verdict on the card it ran on → runs that ran out of memory there; without those that got none."""
    counts_equal: int
    counts_printed: int
    verdicts: dict[Wrong, tuple[int, int]]
    """Kind of card → (wrong, asked)."""


def totals(answers: Sequence[Answer]) -> Totals:
    """Totals over all answers."""
    refused = [answer for answer in answers if answer.stated.refused is not None]
    with_peak = [answer for answer in answers if answer.stated.figures]
    ended = Counter(answer.stated.verdict for answer in answers if answer.record.outcome == "oom")
    counted = [answer for answer in answers if answer.record.counts.trainable is not None and answer.stated.trainable is not None]
    judged: dict[Wrong, int] = {
        "own": sum(answer.stated.verdict in VERDICTS and answer.record.outcome != "failed" for answer in answers),
        "below": sum(bool(answer.overall) for answer in answers),
        "above": sum(bool(answer.overall) for answer in answers),
    }
    return Totals(
        records=len(answers),
        with_peak=len(with_peak),
        no_peak=len(answers) - len(with_peak) - len(refused),
        refused=len(refused),
        out_of_memory={verdict: ended[verdict] for verdict in VERDICTS if ended[verdict]},
        counts_equal=sum(not answer.miscounts for answer in counted),
        counts_printed=len(counted),
        verdicts={kind: (sum(kind in answer.wrong_verdicts for answer in answers), number) for kind, number in judged.items()},
    )
