"""`peftplan measure MODEL`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftplan.cli import options, texts
from peftplan.cli.command import INT, METHOD_HEADING, SECONDS, Command, argument, option
from peftplan.errors import InputError, MissingError, MissingExtraError, UnknownNameError

if TYPE_CHECKING:
    from peftplan.job.options import JobOptions
    from peftplan.job.setup import Engine
    from peftplan.measure.suite import Entry

ENGINES = ("analytic", "trace")


@click.command("measure", cls=Command)
@argument("model", required=False)
@options.group(METHOD_HEADING, texts.METHOD)
@options.group("Model", texts.MODEL)
@options.group("Precision and storage", texts.STORAGE)
@options.group("Training", texts.TRAINING)
@option("--steps", type=INT, default=2, show_default=True, metavar="INT", help="measured optimizer steps")
@option(
    "--warmup",
    type=INT,
    default=1,
    show_default=True,
    metavar="INT",
    help="warm-up steps before them, which create the optimizer states",
)
@option("--suite", default=None, metavar="FILE", help="measure every line of a suite, each in its own process")
@option("--timeout", type=SECONDS, default=600, show_default=True, metavar="SECONDS", help="limit for each run of a suite")
@option(
    "--engine",
    default="analytic",
    metavar="[analytic|trace]",
    show_default=True,
    help="print the drift from the formulas; trace: from both engines",
)
@option("--snapshot", default=None, metavar="FILE", help="save torch's memory snapshot, for replay or pytorch.org/memory_viz")
@option("--output", default="runs.jsonl", metavar="FILE", show_default=True, help="append the record to this file")
def command(
    model: str | None,
    steps: int,
    warmup: int,
    suite: str | None,
    timeout: float,
    engine: str,
    snapshot: str | None,
    output: str,
    **raw: object,
) -> int:
    """Measure a fine-tuning run of MODEL on this machine's GPU: random weights, no download, real steps.

    MODEL and the options are those of `peftplan estimate`; the record of the run is appended to a file, and so is one that ran
    out of memory. On several GPUs start it with torchrun; each rank appends a record.

    \b
    peftplan measure llama-3.2-1b --method qlora --batch-size 4
    peftplan measure --suite default --output runs.jsonl
    """
    if engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES)
    engines: tuple[Engine, ...] = ("analytic",) if engine == "analytic" else ("analytic", "trace")
    chosen = options.chosen(raw)
    try:
        if suite is not None:
            if model is not None or chosen or snapshot is not None:
                raise InputError(
                    "--suite", suite, "its lines define the runs; accepted with it: --output, --steps, --warmup, --engine"
                )
            return _suite(suite, Path(output), engines, warmup=warmup, steps=steps, timeout=timeout)
        if model is None:
            raise MissingError("MODEL", "name a model as for `peftplan estimate`, or --suite FILE")
        return _one(model, Path(output), engines, warmup=warmup, steps=steps, snapshot=snapshot, setup=chosen)
    except ImportError as error:
        raise MissingExtraError(f"measure ({error.name or error})", "measure") from None


def _one(
    model: str, output: Path, engines: tuple[Engine, ...], *, warmup: int, steps: int, snapshot: str | None, setup: JobOptions
) -> int:
    from peftplan.measure import lines
    from peftplan.measure.one import measure_and_record

    saved = Path(snapshot) if snapshot else None
    record = measure_and_record(model, output=output, warmup=warmup, steps=steps, snapshot=saved, **setup)
    click.echo("\n".join(lines.of_record(record, lines.answers(record, engines))))
    click.echo(f"{record.id} appended to {output}")
    return 1 if record.outcome == "failed" else 0


def _suite(suite: str, output: Path, engines: tuple[Engine, ...], *, warmup: int, steps: int, timeout: float) -> int:
    from peftplan.datafiles import DATA
    from peftplan.files import is_file
    from peftplan.measure import lines
    from peftplan.measure.suite import pending, read_suite, run_suite

    shipped = DATA / "suites" / f"{suite}.jsonl"
    entries = read_suite(shipped if is_file(shipped) else Path(suite))
    already = len(entries) - len(pending(entries, output))
    if already:
        click.echo(f"{already} of {len(entries)} runs are in {output} already")
    records, answers = [], []
    for measured in run_suite(entries, output=output, timeout=timeout, warmup=warmup, steps=steps, starting=_starting):
        records.append(measured.record)
        answers.append(lines.answers(measured.record, engines))
        click.echo(lines.of_run(measured.number, measured.of, measured.record, answers[-1], seconds=measured.seconds))
    click.echo("\n".join(lines.of_suite(records, answers)))
    return 1 if any(record.outcome == "failed" for record in records) else 0


def _starting(number: int, of: int, entry: Entry) -> None:
    """On a terminal, what runs now; its line is overwritten by the result's."""
    if sys.stderr.isatty():
        click.echo(f"[{number:>{len(str(of))}}/{of}] {entry.model} {entry.run.method_name} …\r", nl=False, err=True)
