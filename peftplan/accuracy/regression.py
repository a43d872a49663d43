"""`peftplan check` as a function: which records, which baseline, and what is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from peftplan.accuracy import baseline as stored
from peftplan.accuracy.check import Check, check, shown
from peftplan.accuracy.drift import Answer
from peftplan.accuracy.engines import Case, read_cases, sampled
from peftplan.accuracy.jsonl import repair
from peftplan.errors import RefusedError, UnknownNameError
from peftplan.job.setup import Engine

LIBRARIES: dict[Engine, tuple[str, ...]] = {
    "analytic": ("peftplan",),
    "trace": ("peftplan", "torch", "transformers", "peft", "bitsandbytes", "accelerate"),
}
"""What decides what an engine states; their versions are stored beside it."""


def run(
    files: Sequence[Path],
    *,
    engine: str = "analytic",
    ids: Sequence[str] = (),
    sample: int | None = None,
    seed: int = 0,
    baseline: Path | None = None,
    update_baseline: bool = False,
    progress: Callable[[Answer], None] = lambda answer: None,
) -> Check:
    """Check the records of `files`, or those that ship.

    With `update_baseline` what is stated now is written to the baseline first, so that nothing has moved against it. Raises
    RecordFileError for a file with a line that is no record.
    """
    if engine not in LIBRARIES:
        raise UnknownNameError("engine", engine, LIBRARIES)
    cases = sampled(_chosen(read_cases(files), ids), number=sample, seed=seed)
    path = baseline or stored.BASELINE
    before = stored.load(path, may_be_new=update_baseline or baseline is None)
    checked = check(cases, engine, baseline=before, progress=progress)
    if not update_baseline:
        return checked
    after = stored.updated(before, engine, checked.answers, versions=versions(engine))
    stored.save(after, path)
    return Check(engine, checked.answers, tuple(f for f in checked.failures if f.kind != "baseline"), new=0)


def versions(engine: Engine) -> dict[str, str]:
    """Installed versions of what decides what the engine states, local tags (`+cpu`) left out."""
    installed = {}
    for name in LIBRARIES[engine]:
        try:
            installed[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return installed


def repaired(files: Sequence[Path]) -> list[str]:
    """Repair each file, and say what was done. Raises RefusedError without files."""
    if not files:
        raise RefusedError("--repair needs the record files to repair")
    return [
        f"{shown(path)}: {f'{cut} bytes set aside in {shown(path)}.cut' if (cut := repair(path)) else 'whole'}" for path in files
    ]


def _chosen(cases: list[Case], ids: Sequence[str]) -> list[Case]:
    known = {case.record.id for case in cases}
    for record_id in ids:
        if record_id not in known:
            raise UnknownNameError("--id", record_id, known)
    return [case for case in cases if not ids or case.record.id in ids]
