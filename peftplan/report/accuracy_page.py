"""docs/accuracy.md and its plots, from files alone: the records, the stored baseline and the stored run of the other tools."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from peftplan.accuracy import baseline as stored
from peftplan.accuracy import peers
from peftplan.accuracy.drift import Answer, apart
from peftplan.accuracy.engines import NOT_EXPRESSIBLE, OVERALL, Case, read_cases
from peftplan.accuracy.records import SETUPS, Record
from peftplan.job.setup import Engine
from peftplan.report import accuracy, accuracy_plots
from peftplan.report.accuracy_text import (
    CAUSES,
    CHOICES,
    DEFINITIONS,
    INTRO,
    OTHERS,
    OTHERS_COLUMNS,
    OTHERS_ROWS,
    PEERS_INTRO,
    UNBOUNDED,
)
from peftplan.report.markdown import table

PAGE = Path("docs") / "accuracy.md"
PLOTS = "accuracy"
ENGINES: dict[Engine, str] = {"analytic": "estimated", "trace": "traced"}


def write(root: Path | None = None) -> None:
    """Write the page and its plots below `root`, or here. Raises MissingExtraError without matplotlib."""
    page = (root or Path.cwd()) / PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    answers = {engine: stored_answers(engine) for engine in ENGINES}
    plotted = {engine: apart(of_engine)[0] for engine, of_engine in answers.items()}
    folder = page.parent / PLOTS
    series = {ENGINES[engine]: _drifts(of_engine) for engine, of_engine in plotted.items() if _drifts(of_engine)}
    if series:
        accuracy_plots.histogram(series, folder / "drift.svg")
    for engine, of_engine in plotted.items():
        if _drifts(of_engine):
            accuracy_plots.scatter(of_engine, folder / f"{engine}.svg", word=ENGINES[engine])
    page.write_text(text(answers), encoding="utf-8")


def stored_answers(engine: Engine) -> list[Answer]:
    """What the baseline holds of every shipped record."""
    baseline = stored.load(stored.BASELINE)
    pairs = ((case, baseline.stated(engine, case.record.id)) for case in read_cases([]))
    return [Answer(case, prediction) for case, prediction in pairs if prediction is not None]


def text(answers: dict[Engine, list[Answer]]) -> str:
    """The whole page."""
    cases = read_cases([])
    others = [OTHERS, table(OTHERS_COLUMNS, OTHERS_ROWS)]
    tools = _other_tools([case.record for case in cases if case.record.run.strategy is None], answers)
    parts = [INTRO, *_engines(answers), CAUSES, *_runs(cases), *tools, *others, DEFINITIONS]
    return "\n\n".join(parts) + "\n"


def _engines(answers: dict[Engine, list[Answer]]) -> Iterable[str]:
    versions = stored.load(stored.BASELINE).versions
    if any(_drifts(of_engine) for of_engine in answers.values()):
        yield f"![Drift of the overall peaks]({PLOTS}/drift.svg)"
    for engine, of_engine in answers.items():
        yield f"## Engine {engine}"
        by = ", ".join(f"{name} {version}" for name, version in versions.get(engine, {}).items())
        lines = [*accuracy.headline(engine, of_engine), f"Stored with {by}."]
        yield "\n".join(f"- {line}" for line in lines)
        if _drifts(of_engine):
            yield f"![{ENGINES[engine].capitalize()} against measured, by source]({PLOTS}/{engine}.svg)"
        yield from accuracy.tables(of_engine)
        if wrong := _wrong(of_engine):
            yield table(("wrong verdict", "card", "said", "figures"), wrong)
        if refusals := accuracy.refused(of_engine):
            yield table(("refused", "why"), refusals)


def _wrong(answers: Sequence[Answer]) -> list[tuple[str, str, str, str]]:
    cards = {"own": "the one it ran on", "below": "1 % below its peak", "above": "10 % above its peak"}
    return [
        (answer.record.id, cards[kind], verdicts, "; ".join(f"{one.figure} {one.drift:+.2f} %" for one in answer.overall))
        for answer in answers
        for kind, verdicts in answer.wrong_verdicts.items()
    ]


def _drifts(answers: Sequence[Answer]) -> list[float]:
    return [one.drift for answer in answers for one in answer.overall]


def _runs(cases: Sequence[Case]) -> Iterable[str]:
    yield "## The measured runs"
    yield (
        "Each line of `data/runs/*.jsonl` is one run in peftplan's own words, with its circumstances, source and licence, and a"
        " digest that notices edits. Imported by `tools/import_runs`; runs measured by `peftplan measure` have the same form."
    )
    by_file: dict[Path, list[Record]] = {}
    for case in cases:
        by_file.setdefault(case.path, []).append(case.record)
    rows = [_file_row(path, records) for path, records in by_file.items()]
    yield table(("file", "source", "licence", "runs", *SETUPS, "measured", "GPU"), rows)
    opens = Counter((path.name, what) for path, records in by_file.items() for record in records for what in _open(record))
    yield "What they leave open, or ran otherwise:"
    yield table(("file", "runs", "what"), [(name, str(times), what) for (name, what), times in sorted(opens.items())])
    yield CHOICES
    chosen = Counter((path.name, i.evidence, i.what) for path, records in by_file.items() for r in records for i in r.inferred)
    yield table(
        ("file", "runs", "evidence", "choice"),
        [(name, str(times), evidence, what) for (name, evidence, what), times in sorted(chosen.items())],
    )
    unbounded = [record.id for records in by_file.values() for record in records if _unbounded(record)]
    yield UNBOUNDED.format(runs=", ".join(unbounded))
    left_out = [json.loads(line) for line in NOT_EXPRESSIBLE.read_text(encoding="utf-8").splitlines()]
    yield f"Published rows that no setup describes ({len(left_out)}, in `data/runs/{NOT_EXPRESSIBLE.name}`):"
    reasons = Counter((row["source"], row["why"]) for row in left_out)
    yield table(("source", "rows", "why"), [(source, str(times), why) for (source, why), times in sorted(reasons.items())])


def _file_row(path: Path, records: Sequence[Record]) -> tuple[str, ...]:
    measured = [metric for metric in OVERALL if any(record.peaks.figure(metric) for record in records)]  # type: ignore[arg-type]
    phases = ["by phase"] if any(record.peaks.by_phase for record in records) else []
    places = [sorted({of(record) for record in records}) for of in (_source, _licence, _gpu)]
    source, licence, gpu = (", ".join(names) for names in places)
    setups = Counter(record.setup for record in records)
    shares = [str(setups[setup]) for setup in SETUPS]
    return path.name, source, licence, str(len(records)), *shares, ", ".join(measured + phases), gpu


def _unbounded(record: Record) -> bool:
    """Whether the trace is held to what the run allocated, and not to what it reserved."""
    bounds = record.tolerance.get("trace")
    return bounds is not None and bounds.reserved is None and record.peaks.figure("reserved") is not None


def _source(record: Record) -> str:
    where = record.circumstances
    return f"{where.source} ({where.repo})" if where.repo else where.source


def _licence(record: Record) -> str:
    return record.circumstances.licence


def _gpu(record: Record) -> str:
    return record.circumstances.gpu


def _open(record: Record) -> list[str]:
    return [*(f"unknown: {what}" for what in record.unknown), *(f"differs: {what}" for what in record.differs)]


def _other_tools(records: Sequence[Record], answers: dict[Engine, list[Answer]]) -> Iterable[str]:
    stored_run = peers.load()
    if stored_run is None:
        return
    yield PEERS_INTRO.format(python=f"Python {stored_run.python}")
    yield table(*peers.table(stored_run, records))
    for engine, of_engine in answers.items():
        ours = {answer.record.id: answer.overall[0] for answer in of_engine if answer.overall}
        rows = [peers.against(name, stored_run, ours, records) for name in stored_run.tools if name != "peftplan"]
        if ours:
            word = ENGINES[engine]
            yield f"The same tools and what peftplan {word}, on the runs that both accept:"
            yield table(("tool", "runs", "its median", "its worst", f"{word}: median", f"{word}: worst"), rows)
    yield "What they refuse:"
    refusals = [
        (name, str(times), why)
        for name, tool in stored_run.tools.items()
        if name != "peftplan"
        for why, times in tool.refused.items()
    ]
    yield table(("tool", "records", "why"), refusals)
