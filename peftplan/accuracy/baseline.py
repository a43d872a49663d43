"""The stored baseline: what each engine last stated for every record, in data/runs/baseline.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from peftplan import files
from peftplan.accuracy.drift import Answer
from peftplan.accuracy.engines import RUNS, Figure, Stated
from peftplan.errors import InputError
from peftplan.job.setup import Engine

BASELINE = RUNS / "baseline.json"
MOVED = 0.01
"""Percent of what was measured: a smaller change of a stated figure is not reported."""


class Entry(BaseModel):
    """What was stated of one record, `Stated` without its empty fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    trainable: int | None = None
    total: int | None = None
    figures: dict[Figure, int] = {}
    verdict: str | None = None
    refused: str | None = None


class Baseline(BaseModel):
    """Engine → record → what was stated; and the versions of the libraries that an engine ran."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_version: int = 1
    versions: dict[Engine, dict[str, str]] = {}
    engines: dict[Engine, dict[str, Entry]] = {}

    def stated(self, engine: Engine, record_id: str) -> Stated | None:
        """What the engine stated of a record; None where it was not asked."""
        entry = self.engines.get(engine, {}).get(record_id)
        return None if entry is None else Stated(**entry.model_dump())


def load(path: Path, *, may_be_new: bool = False) -> Baseline:
    """The baseline of a file; where it may be new and there is none, an empty one."""
    if may_be_new and not os.path.exists(path):
        return Baseline()
    content = files.content(path, field="baseline")
    try:
        return Baseline.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError("baseline", str(path), f"not a baseline: {where}: {first['msg']}") from None


def updated(baseline: Baseline, engine: Engine, answers: Sequence[Answer], *, versions: dict[str, str]) -> Baseline:
    """The baseline with these answers in place of the engine's old ones; records that were not asked keep theirs."""
    entries = {
        answer.record.id: Entry.model_validate(_filled(answer.stated))
        for answer in answers
        if not (answer.stated.lacks_extra or answer.stated.crashed)
    }
    return baseline.model_copy(
        update={
            "versions": {**baseline.versions, engine: versions},
            "engines": {**baseline.engines, engine: {**baseline.engines.get(engine, {}), **entries}},
        }
    )


def save(baseline: Baseline, path: Path) -> None:
    """Write it, one line per record, in a fixed order."""
    engines = [
        f"{json.dumps(engine)}: {{\n" + ",\n".join(_entry_lines(entries)) + "\n}"
        for engine, entries in sorted(baseline.engines.items())
    ]
    versions = json.dumps(baseline.versions, sort_keys=True)
    text = (
        f'{{"schema_version": {baseline.schema_version},\n"versions": {versions},\n"engines": {{\n'
        + ",\n".join(engines)
        + "\n}}\n"
    )
    path.write_text(text, encoding="utf-8")


def _entry_lines(entries: dict[str, Entry]) -> Iterator[str]:
    for record_id in sorted(entries):
        fields = entries[record_id].model_dump(mode="json", exclude_defaults=True)
        yield f"{json.dumps(record_id)}: {json.dumps(fields, ensure_ascii=False)}"


def _filled(prediction: Stated) -> dict[str, object]:
    return {name: value for name, value in asdict(prediction).items() if value not in (None, {}, False)}


def moves(answer: Answer, old: Stated | None) -> list[str]:
    """What the engine states otherwise than the baseline says; to state something new is no move."""
    if old is None or answer.stated.lacks_extra or answer.stated.crashed:
        return []
    changes = [
        f"{figure}: {_was(old.figures[figure], answer.stated.figures.get(figure), measured=measured)}"
        for figure, measured in _watched(answer, old)
        if _moved(old.figures[figure], answer.stated.figures.get(figure), measured)
    ]
    for what in ("trainable", "total"):
        before, now = getattr(old, what), getattr(answer.stated, what)
        if before is not None and before != now:
            changes.append(f"{what} parameters: {before:,} in the baseline, {'none' if now is None else f'{now:,}'} now")
    if old.verdict not in (None, "unknown", answer.stated.verdict):
        changes.append(f"verdict on the card it ran on: {old.verdict} in the baseline, {answer.stated.verdict} now")
    return changes


def _watched(answer: Answer, old: Stated) -> Iterator[tuple[Figure, int]]:
    """Figures of the baseline, each with the measured number that a change is measured by."""
    from peftplan.accuracy.drift import measured_figures

    measured = dict(measured_figures(answer.record))
    yield from ((figure, number) for figure, number in measured.items() if figure in old.figures)


def _moved(before: int, now: int | None, measured: int) -> bool:
    return now is None or 100 * abs(now - before) > MOVED * measured


def _was(before: int, now: int | None, *, measured: int) -> str:
    drift = f"{before:,} bytes ({100 * (before / measured - 1):+.2f} %) in the baseline"
    return f"{drift}, none now" if now is None else f"{drift}, {now:,} ({100 * (now / measured - 1):+.2f} %) now"
