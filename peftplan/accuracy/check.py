"""The regression: every record through an engine, what it drifts by, and what is a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftplan.accuracy import baseline as stored
from peftplan.accuracy.drift import Answer
from peftplan.accuracy.engines import Case, Stated, ask, same_answer
from peftplan.accuracy.records import PHASES
from peftplan.job.setup import Engine


@dataclass(frozen=True)
class Failure:
    """One thing that a check found wrong with one record."""

    case: Case
    kind: str
    """`tolerance`, `baseline`, `count` or `crash`."""
    what: str

    def text(self, engine: Engine) -> str:
        """Case, line, numbers, and the command that repeats it."""
        where = f"{self.case.record.id} ({shown(self.case.path)}:{self.case.line})"
        return f"{self.kind}: {where} {self.what}; again: {command(self.case, engine)}"


@dataclass(frozen=True)
class Check:
    """A check of many records with one engine."""

    engine: Engine
    answers: tuple[Answer, ...]
    failures: tuple[Failure, ...]
    new: int
    """Records for which the baseline has nothing yet, or less."""


def shown(path: Path) -> str:
    """A path as a user types it: relative to the current folder if it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def command(case: Case, engine: Engine) -> str:
    """The command that checks this case alone."""
    return f"peftplan check {shown(case.path)} --id {case.record.id} --engine {engine}"


def check(
    cases: Sequence[Case],
    engine: Engine,
    *,
    baseline: stored.Baseline,
    progress: Callable[[Answer], None] = lambda answer: None,
) -> Check:
    """Ask the engine about every case, and compare with what was measured, with the tolerances and with the baseline.

    What was run twice is asked once.
    """
    answers = []
    predictions: dict[str, Stated] = {}
    for case in cases:
        same = same_answer(case.record)
        if same not in predictions:
            predictions[same] = ask(case.record, engine)
        answers.append(Answer(case, predictions[same]))
        progress(answers[-1])
    old = {answer.record.id: baseline.stated(engine, answer.record.id) for answer in answers}
    failures = [failure for answer in answers for failure in _failures(answer, engine, old[answer.record.id])]
    new = sum(_says_more(answer.stated, old[answer.record.id]) for answer in answers)
    return Check(engine, tuple(answers), tuple(failures), new)


def _says_more(now: Stated, before: Stated | None) -> bool:
    return before is None or bool(set(now.figures) - set(before.figures))


def _failures(answer: Answer, engine: Engine, old: Stated | None) -> Iterator[Failure]:
    if answer.stated.crashed:
        yield Failure(answer.case, "crash", str(answer.stated.refused))
    yield from (Failure(answer.case, "count", what) for what in _miscounts(answer))
    yield from (Failure(answer.case, "tolerance", what) for what in _exceeded(answer, engine))
    yield from (Failure(answer.case, "baseline", what) for what in stored.moves(answer, old))


def _miscounts(answer: Answer) -> Iterator[str]:
    for what, printed, predicted in answer.miscounts:
        percent = 100 * (predicted / printed - 1)
        yield f"{what} parameters: stated {predicted:,}, printed by the run {printed:,} ({percent:+.4f} %)"


def _exceeded(answer: Answer, engine: Engine) -> Iterator[str]:
    """Figures outside the record's own tolerance, the source's rounding granted."""
    tolerance = answer.record.tolerance.get(engine)
    if tolerance is None:
        return
    for one in answer.compared:
        limit: float | None = getattr(tolerance, "phases" if one.figure in PHASES else one.figure)
        if limit is not None and abs(one.drift) > limit + one.slack:
            numbers = f"stated {one.stated:,} bytes, measured {one.measured:,} ({one.drift:+.2f} %)"
            yield f"{one.figure}: {numbers}; the tolerance is {limit:g} %"
