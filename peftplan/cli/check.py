"""`peftplan check [FILE…]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftplan.cli.command import INT, POSITIVE, Command, argument, option, will_exit

if TYPE_CHECKING:
    from peftplan.accuracy.drift import Answer


@click.command("check", cls=Command)
@argument("files", nargs=-1, type=Path, metavar="FILE")
@option("--engine", default="analytic", metavar="[analytic|trace]", show_default=True, help="the engine to compare")
@option("--id", "ids", multiple=True, metavar="ID", help="only this record; repeatable")
@option("--sample", type=POSITIVE, metavar="INT", help="check only this many records, drawn with --seed")
@option("--seed", type=INT, default=0, metavar="INT", show_default=True, help="seed of --sample")
@option("--baseline", type=Path, metavar="FILE", help="default: data/runs/baseline.json")
@option("--update-baseline", is_flag=True, help="store today's predictions as the baseline instead of comparing")
@option("--report", is_flag=True, help="write docs/accuracy.md and its plots (needs matplotlib: extra plot)")
@option("--repair", is_flag=True, help="move a truncated last line of FILE aside, and check nothing")
@option("--format", "fmt", default="table", metavar="[table|json|markdown|junit]", show_default=True, help="output format")
def command(
    files: tuple[Path, ...],
    engine: str,
    ids: tuple[str, ...],
    sample: int | None,
    seed: int,
    baseline: Path | None,
    update_baseline: bool,
    report: bool,
    repair: bool,
    fmt: str,
) -> int:
    """Compare an engine's predictions with measured runs.

    Each FILE holds run records in JSON Lines; the default is those that ship with peftplan. Exit code 1 if a record's
    tolerance is exceeded, a parameter count differs, or something moved against the baseline.

    \b
    peftplan check
    peftplan check my-runs.jsonl --engine trace --sample 5
    """
    from peftplan.accuracy import regression
    from peftplan.errors import UnknownNameError
    from peftplan.report import checked as shown

    if fmt not in shown.FORMATS:
        raise UnknownNameError("format", fmt, shown.FORMATS)
    if repair:
        for line in regression.repaired(files):
            click.echo(line)
        return 0

    def tell(answer: Answer) -> None:
        if engine == "trace" and sys.stderr.isatty():  # a trace takes seconds
            drifts = ", ".join(f"{one.figure} {one.drift:+.2f} %" for one in answer.overall)
            click.echo(f"{answer.record.id}: {answer.stated.refused or drifts or 'no peak stated'}", err=True)

    checked = regression.run(
        files,
        engine=engine,
        ids=ids,
        sample=sample,
        seed=seed,
        baseline=baseline,
        update_baseline=update_baseline,
        progress=tell,
    )
    if report:
        from peftplan.report import accuracy_page

        accuracy_page.write()
    code = will_exit(1 if checked.failures else 0)
    shown.check(checked, fmt=fmt)
    return code
