"""Random jobs: the formulas against the trace, and random adapter configs against peft's own counts. Run it nightly.

    python -m tools.random_jobs [--jobs N] [--adapters N] [--seed S] [--out FILE] [--model-type T ...]
    python -m tools.random_jobs --only NUMBER ... [--seed S]
    python -m tools.random_jobs --job '{"config": {...}, "options": {...}}'

`tools.random_draws` says what is drawn, and within which bounds. Of each job it compares the allocated bytes of every phase and
the reserved bytes of the run, and whether both engines refuse it. `--out` keeps a line of JSON per job and goes on where it
stopped; delete the file after a change of the code. It prints the jobs beyond the tolerances, worst first, each with its number
and JSON, then the reasons for which jobs have no two numbers, and ends with one line of totals. Exit status 1 if any job is
beyond, or has a number from one engine alone that the other refuses. Needs the extra `trace`; a job takes some seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from peftplan.errors import NeedsTraceError, PeftplanError
from peftplan.planning.estimate import estimate
from tools.random_adapters import compare_counts
from tools.random_draws import Job, draw_job

ALLOCATED, RESERVED = 0.01, 0.02
"""The tolerances: of a phase's allocated bytes, and of the run's reserved bytes."""
RUN = "reserved"
Peaks = dict[str, int] | str


@dataclass(frozen=True)
class Outcome:
    """Bytes by phase, and reserved bytes, of both engines; or why one has none."""

    number: int
    job: dict[str, Any]
    analytic: Peaks
    traced: Peaks

    def drifts(self) -> dict[str, float]:
        """Analytic ÷ traced − 1, by phase and of the reserved bytes; empty where an engine has no number."""
        if isinstance(self.analytic, str) or isinstance(self.traced, str):
            return {}
        return {name: self.analytic.get(name, 0) / theirs - 1 for name, theirs in self.traced.items() if theirs}

    def beyond(self) -> float:
        """The farthest drift, in tolerances."""
        return max((abs(d) / (RESERVED if name == RUN else ALLOCATED) for name, d in self.drifts().items()), default=0)

    def kind(self) -> Literal["scored", "no formula", "refused", "one alone"]:
        """Whether there are two numbers, no formula, or one engine that refuses what the other counts."""
        refused = [isinstance(peaks, str) and peaks.startswith("refused") for peaks in (self.analytic, self.traced)]
        if not isinstance(self.analytic, str) and not isinstance(self.traced, str):
            return "scored"
        if isinstance(self.analytic, str) and self.analytic.startswith("no formula"):
            return "no formula"
        return "refused" if all(refused) else "one alone"


def peaks(job: Job, engine: Literal["analytic", "trace"]) -> Peaks:
    """What an engine says of a job."""
    try:
        estimated = estimate(job.config, engine=engine, **job.options)
        if estimated.peaks:
            return {**estimated.peaks.by_phase, RUN: estimated.peaks.reserved or 0}
    except PeftplanError as error:
        return f"refused: {error}"
    except Exception as error:  # a fault of ours: it is reported like a number of one engine alone
        return f"raised: {type(error).__name__}: {error}"
    reason = estimated.not_modelled[0]
    return f"no formula: {reason}" if reason.endswith(NeedsTraceError.hint) else f"refused: {reason}"


def outcome(number: int, job: Job) -> Outcome:
    """Both engines on one job."""
    analytic = peaks(job, "analytic")
    needless = analytic.startswith("no formula") if isinstance(analytic, str) else False
    return Outcome(number, job._asdict(), analytic, "not asked" if needless else peaks(job, "trace"))


def outcomes(seed: int, numbers: Iterable[int], *, out: Path | None, model_types: list[str]) -> Iterator[Outcome]:
    """Every job's outcome; those that `out` has already are read."""
    lines = out.read_text(encoding="utf-8").splitlines() if out is not None and out.exists() else []
    known = {row["number"]: Outcome(**row) for row in map(json.loads, lines)}
    for number in numbers:
        if number in known:
            yield known[number]
            continue
        answer = outcome(number, draw_job(seed, number, model_types=model_types))
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(answer)) + "\n")
        print(line(answer), file=sys.stderr, flush=True)
        yield answer


def line(answer: Outcome) -> str:
    """One job on one line: number, model type, drifts, options."""
    drifts = " ".join(f"{name} {100 * d:+.2f} %" for name, d in answer.drifts().items() if abs(d) >= 0.0005)
    said = {"scored": drifts or "equal"}.get(
        answer.kind(), f"{answer.kind()}: {_short(answer.analytic)} / {_short(answer.traced)}"
    )
    return f"{answer.number:5} {answer.job['config']['model_type']}: {said}; {answer.job['options']}"


def _short(of_engine: Peaks) -> str:
    return of_engine[:160] if isinstance(of_engine, str) else "a number"


def report(answers: list[Outcome]) -> Iterator[str]:
    """The jobs beyond the tolerances, worst first; those without two numbers; the totals."""
    failing = [answer for answer in answers if answer.beyond() > 1]
    for answer in sorted(failing, key=Outcome.beyond, reverse=True):
        yield f"beyond: {line(answer)}\n      --job '{json.dumps(answer.job)}'"
    alone = [answer for answer in answers if answer.kind() == "one alone"]
    yield from (f"one alone: {line(answer)}\n      --job '{json.dumps(answer.job)}'" for answer in alone)
    for kind, of_engine in (("no formula", "analytic"), ("refused", "traced")):
        reasons = Counter(re.sub(r"\d+", "N", _short(getattr(a, of_engine))) for a in answers if a.kind() == kind)
        yield from (f"{kind}, {count} jobs: {reason}" for reason, count in reasons.most_common())
    kinds = Counter(answer.kind() for answer in answers)
    farthest = {name: max((abs(a.drifts().get(name, 0)) for a in answers), default=0) for name in PHASES}
    drifts = [abs(d) for a in answers for name, d in a.drifts().items() if name != RUN]
    yield (
        f"{len(answers)} jobs: {kinds['scored']} scored, {len(failing)} beyond {ALLOCATED:.0%} allocated "
        f"or {RESERVED:.0%} reserved, {len(alone)} that one engine alone refuses, {kinds['refused']} refused by both, "
        f"{kinds['no formula']} without formulas; median absolute drift {median(drifts or [0]):.4%}; worst "
        + ", ".join(f"{name} {drift:.2%}" for name, drift in farthest.items())
    )


PHASES = ("load", "forward", "backward", "step", RUN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--adapters", type=int, default=0, help="adapter configs to compare with peft's counts, after the jobs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first job")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model-type", nargs="*", default=[])
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the jobs to run")
    parser.add_argument("--job", help="the JSON of one job, as the report prints it")
    options = parser.parse_args()
    if options.job:
        print(*report([outcome(0, Job(**json.loads(options.job)))]), sep="\n")
        return 0
    numbers = options.only if options.only is not None else range(options.first, options.first + options.jobs)
    answers = list(outcomes(options.seed, numbers, out=options.out, model_types=options.model_type))
    print(*report(answers), sep="\n")
    faults = any(answer.beyond() > 1 or answer.kind() == "one alone" for answer in answers)
    for said in compare_counts(options.seed, options.adapters):
        print(said.text)
        faults |= said.fault
    return int(faults)


if __name__ == "__main__":
    sys.exit(main())
