"""What an engine says about each record: a `Stated` of plain numbers, so that live results and stored ones are the same thing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peftplan import versions
from peftplan.accuracy.jsonl import read
from peftplan.accuracy.records import Record
from peftplan.datafiles import DATA
from peftplan.errors import MissingExtraError, PeftplanError
from peftplan.job.script import EXAMPLES, Script
from peftplan.job.setup import Engine
from peftplan.planning.estimate import estimate
from peftplan.results.estimate import Estimate

RUNS = DATA / "runs"
NOT_EXPRESSIBLE = RUNS / "not_expressible.jsonl"
"""Published rows that no setup describes, each with the reason; not records."""

Figure = Literal["allocated", "reserved", "device", "load", "forward", "backward", "step"]
OVERALL: tuple[Figure, ...] = ("allocated", "reserved", "device")
BY_PHASE: tuple[Figure, ...] = ("load", "forward", "backward", "step")
FIGURES = OVERALL + BY_PHASE
"""The overall peaks, and the allocated peak of each phase."""


@dataclass(frozen=True)
class Case:
    """A record and the line it stands on."""

    path: Path
    line: int
    record: Record


@dataclass(frozen=True)
class Stated:
    """What an engine states of a run; `figures` lacks what it does not state. `verdict`: on the card that it ran on."""

    trainable: int | None = None
    total: int | None = None
    figures: dict[Figure, int] = field(default_factory=dict)
    verdict: str | None = None
    refused: str | None = None
    """Why the engine says nothing at all."""
    crashed: bool = False
    """Whether that was an error of peftplan's own, which is a failure of the check."""
    lacks_extra: bool = False
    """Whether only an extra is missing here, so that nothing can be concluded."""


def record_files() -> list[Path]:
    """The record files that ship with peftplan."""
    return sorted(path for path in RUNS.glob("*.jsonl") if path != NOT_EXPRESSIBLE)


def read_cases(paths: Sequence[Path]) -> list[Case]:
    """Every record of the files with its line; without files, those that ship. Raises RecordFileError."""
    return [Case(path, line, record) for path in paths or record_files() for line, record in enumerate(read(path), start=1)]


def sampled(cases: Sequence[Case], *, number: int | None, seed: int) -> list[Case]:
    """`number` of the cases drawn by `seed`, in their order; all of them where `number` is None or larger."""
    if number is None or number >= len(cases):
        return list(cases)
    drawn = set(random.Random(seed).sample(range(len(cases)), number))
    return [case for at, case in enumerate(cases) if at in drawn]


def ask(record: Record, engine: Engine) -> Stated:
    """Estimate, or trace, one record's setup. What peftplan refuses is an answer too; without its extra, trace has none."""
    options = record.run.arguments()
    options["script"] = _script(record)
    try:
        result = estimate(record.run.model, gpu=record.circumstances.gpu_id, engine=engine, **options)
    except MissingExtraError as error:
        if engine == "trace":
            raise
        return Stated(refused=str(error), lacks_extra=True)
    except PeftplanError as error:
        return Stated(refused=str(error))
    except Exception as error:  # one engine's bug on one record; the check goes on and fails
        return Stated(refused=f"crashed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", crashed=True)
    return stated(record, result)


def _script(record: Record) -> Script:
    """What the program did, on the torch and transformers that it says or that the record names."""
    return record.run.script.ran_on(record.circumstances.versions)


def same_answer(record: Record) -> str:
    """All that `ask` reads of a record: where it is the same, so is the answer. Versions count by what they do."""
    script = {
        name: versions.behaviour(name, value) if name in EXAMPLES else value
        for name, value in _script(record).model_dump(mode="json").items()
    }
    read = (record.run.model_dump(mode="json"), script, record.circumstances.gpu_id, record.covers, record.peaks.context_bytes)
    return json.dumps(read, sort_keys=True)


def stated(record: Record, result: Estimate) -> Stated:
    """An estimate's numbers, those that compare with the record's."""
    return Stated(
        trainable=result.trainable_parameters,
        total=result.total_parameters,
        figures=dict(_figures(record, result)),
        verdict=result.gpus[0].verdict if result.gpus else None,
    )


def _figures(record: Record, result: Estimate) -> Iterator[tuple[Figure, int]]:
    """The peaks that compare with the record's: loading counts where the record's peak covers it."""
    if result.peaks is None:
        return
    peaks = result.peaks
    covered = BY_PHASE if record.covers == "whole-run" else BY_PHASE[1:]
    yield "allocated", max(peaks.by_phase[phase] for phase in covered)
    context = record.peaks.context_bytes
    if context is None and result.gpus:
        context = result.gpus[0].runtime_context
    if peaks.reserved is not None:
        yield "reserved", peaks.reserved
        if context is not None:
            yield "device", peaks.reserved + context
    for phase in BY_PHASE:
        yield phase, peaks.by_phase[phase]
