"""Random jobs: the formulas against the trace, and random adapter configs against peft's own counts. Run it nightly.

    python -m tools.random_jobs [--jobs N] [--adapters N] [--seed S] [--traces FILE] [--model-type T ...]
    python -m tools.random_jobs --only NUMBER ... [--seed S] [--traces FILE]
    python -m tools.random_jobs --job '{"config": {...}, "options": {...}}'

`tools.random_draws` says what is drawn, and within which bounds. Of each job it compares the allocated bytes of every phase and
the reserved bytes of the run, and whether both engines refuse it. `--traces` keeps what was traced (`tools.engines`): the tool
goes on where it stopped, and another run over the same file evaluates the formulas alone. It prints the jobs beyond the
tolerances, worst first, each with its number and JSON, then the reasons for which jobs have no two numbers, and ends with one
line of totals. Exit status 1 if any job is beyond, or has a number from one engine alone that the other refuses. Needs the extra
`trace`; a job takes some seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from tools.engines import RESERVED, KeptTraces, Peaks, peaks
from tools.random_adapters import compare_counts
from tools.random_draws import Job, draw_job

ALLOCATED_BAR, RESERVED_BAR = 0.01, 0.02
"""The tolerances: of a phase's allocated bytes, and of the run's reserved bytes."""


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
        ours = self.analytic
        return {name: ours[name] / theirs - 1 for name, theirs in self.traced.items() if theirs and name in ours}

    def beyond(self) -> float:
        """The farthest drift, in tolerances."""
        return max(
            (abs(d) / (RESERVED_BAR if name == RESERVED else ALLOCATED_BAR) for name, d in self.drifts().items()), default=0
        )

    def kind(self) -> Literal["scored", "no formula", "refused", "one alone"]:
        """Whether there are two numbers, no formula, or one engine that refuses what the other counts."""
        refused = [isinstance(peaks, str) and peaks.startswith("refused") for peaks in (self.analytic, self.traced)]
        if not isinstance(self.analytic, str) and not isinstance(self.traced, str):
            return "scored"
        if isinstance(self.analytic, str) and self.analytic.startswith("no formula"):
            return "no formula"
        return "refused" if all(refused) else "one alone"


def outcome(number: int, job: Job, traces: KeptTraces | None = None) -> Outcome:
    """Both engines on one job; no trace where there is no formula."""
    traces = traces or KeptTraces(None)
    analytic = peaks(job.config, job.options, "analytic")
    if isinstance(analytic, str) and analytic.startswith("no formula"):
        return Outcome(number, job._asdict(), analytic, "not asked")
    traced = traces.get(*job) or peaks(job.config, job.options, "trace")
    traces.keep(*job, traced)
    return Outcome(number, job._asdict(), analytic, traced)


def line(answer: Outcome) -> str:
    """One job on one line: number, model type, drifts, options."""
    drifts = " ".join(f"{name} {100 * d:+.2f} %" for name, d in answer.drifts().items() if abs(d) >= 0.0005)
    text = {"scored": drifts or "equal"}.get(
        answer.kind(), f"{answer.kind()}: {_short(answer.analytic)} / {_short(answer.traced)}"
    )
    return f"{answer.number:5} {answer.job['config']['model_type']}: {text}; {answer.job['options']}"


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
    drifts = [abs(d) for a in answers for name, d in a.drifts().items() if name != RESERVED]
    yield (
        f"{len(answers)} jobs: {kinds['scored']} scored, {len(failing)} beyond {ALLOCATED_BAR:.0%} allocated "
        f"or {RESERVED_BAR:.0%} reserved, {len(alone)} that one engine alone refuses, {kinds['refused']} refused by both, "
        f"{kinds['no formula']} without formulas; median absolute drift {median(drifts or [0]):.4%}; worst "
        + ", ".join(f"{name} {drift:.2%}" for name, drift in farthest.items())
    )


PHASES = ("load", "forward", "backward", "step", RESERVED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--adapters", type=int, default=0, help="adapter configs to compare with peft's counts, after the jobs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first job")
    parser.add_argument("--traces", type=Path, help="a file of kept traces, read and added to")
    parser.add_argument("--model-type", nargs="*", default=[])
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the jobs to run")
    parser.add_argument("--job", help="the JSON of one job, as the report prints it")
    options = parser.parse_args()
    if options.job:
        print(*report([outcome(0, Job(**json.loads(options.job)))]), sep="\n")
        return 0
    numbers = options.only if options.only is not None else range(options.first, options.first + options.jobs)
    traces, answers = KeptTraces(options.traces), []
    for number in numbers:
        answer = outcome(number, draw_job(options.seed, number, model_types=options.model_type), traces)
        print(line(answer), file=sys.stderr, flush=True)
        answers.append(answer)
    print(*report(answers), sep="\n")
    faults = any(answer.beyond() > 1 or answer.kind() == "one alone" for answer in answers)
    for comparison in compare_counts(options.seed, options.adapters):
        print(comparison.text)
        faults |= comparison.fault
    return int(faults)


if __name__ == "__main__":
    sys.exit(main())
