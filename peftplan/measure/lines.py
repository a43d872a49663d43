"""Measured runs as plain text: one record beside the engines' numbers, and one line per run of a suite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from peftplan.accuracy.drift import Answer, Compared, measured_figures
from peftplan.accuracy.engines import Case, Stated, ask
from peftplan.accuracy.records import Record
from peftplan.job.setup import Engine
from peftplan.units import format_bytes

ONE_LINE = ("allocated", "reserved")
"""The figures of a suite's line: the overall peaks."""
WIDTHS = (12, 14)
"""Widths of the first column and of the others."""


def answers(record: Record, engines: Sequence[Engine]) -> dict[Engine, Answer]:
    """Each engine's answer for a record. A failing engine does not stop the measurement; its failure counts as a refusal."""
    case = Case(Path("measured"), 1, record)
    return {engine: Answer(case, _answer(record, engine)) for engine in engines}


def _answer(record: Record, engine: Engine) -> Stated:
    try:
        return ask(record, engine)
    except Exception as error:
        return Stated(refused=f"{type(error).__name__}: {error}")


def of_record(record: Record, answers: dict[Engine, Answer]) -> list[str]:
    """A record as lines: its title, each figure with every engine's drift, counts, and engines that state no peak."""
    title = f"{record.run.model} · {record.run.method_name} · {record.circumstances.gpu} · {record.outcome}"
    if record.error:
        return [title, record.error]
    lines = [title, _row("", "measured", *answers)]
    for figure, measured in measured_figures(record):
        lines.append(_row(figure, format_bytes(measured), *(_drift(answer, figure) for answer in answers.values())))
    return [*lines, *_counts(record, answers), *_silent(answers)]


def of_run(done_number: int, of: int, record: Record, answers: dict[Engine, Answer], *, seconds: float) -> str:
    """One run of a suite: `[ 3/48] llama-3.2-1b lora ok  allocated 4.12 GiB (analytic +0.4 %)  reserved 4.50 GiB  12 s`."""
    parts = [f"[{done_number:>{len(str(of))}}/{of}] {record.run.model} {record.run.method_name} {record.outcome}"]
    if record.error:
        parts.append(record.error)
    for name in ONE_LINE:
        measured = record.peaks.figure(name)  # type: ignore[arg-type]
        if measured:
            drifts = [f"{engine} {text}" for engine, answer in answers.items() if (text := _drift(answer, name)) != "–"]
            parts.append(f"{name} {format_bytes(measured)}" + (f" ({', '.join(drifts)})" if drifts else ""))
    return "  ".join([*parts, f"{seconds:.0f} s"])


def of_suite(records: Iterable[Record], answers: Iterable[dict[Engine, Answer]]) -> list[str]:
    """A finished suite: outcomes, and the median and worst drift of each engine."""
    outcomes = [record.outcome for record in records]
    lines = [", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("ok", "oom", "failed"))]
    drifts: dict[tuple[str, str], list[float]] = {}
    for answered in answers:
        for engine, answer in answered.items():
            for compared in answer.overall:
                drifts.setdefault((engine, compared.figure), []).append(compared.drift)
    for (name, figure), listed in drifts.items():
        worst = max(listed, key=abs)
        lines.append(f"{name}: {figure} drift over {len(listed)} runs: median {median(listed):+.2f} %, worst {worst:+.2f} %")
    return lines


def _drift(answer: Answer, figure: str) -> str:
    compared: Compared | None = next((one for one in answer.compared if one.figure == figure), None)
    return "–" if compared is None else f"{compared.drift:+.2f} %"


def _counts(record: Record, answers: dict[Engine, Answer]) -> list[str]:
    counts = record.counts
    text = f"trainable {counts.trainable:,} of {counts.total:,} parameters" if counts.trainable is not None else "not counted"
    wrong = [f"{what}: {estimated:,} estimated" for answer in answers.values() for what, _, estimated in answer.miscounts]
    return [f"{text}; {', '.join(dict.fromkeys(wrong)) or 'as estimated'}"]


def _silent(answers: dict[Engine, Answer]) -> list[str]:
    """Engines that state no peak, with the reason where there is one."""
    silent = {engine: answer.stated.refused for engine, answer in answers.items() if not answer.compared}
    return [f"{engine}: {refused or 'gives no peak for this run'}" for engine, refused in silent.items()]


def _row(first: str, *others: str) -> str:
    name, cell = WIDTHS
    return first.ljust(name) + "".join(other.rjust(cell) for other in others)
