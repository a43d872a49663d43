"""`peftplan rehearse -- COMMAND`."""

from __future__ import annotations

import inspect
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from peftplan.cli import options
from peftplan.cli.command import INT, SECONDS, Command, argument, option, will_exit
from peftplan.errors import InputError
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from peftplan.rehearse.request import Request
    from peftplan.results.rehearsal import Rehearsal


@click.command("rehearse", cls=Command)
@argument("command", nargs=-1, type=click.UNPROCESSED)
@option("--gpu", default=None, metavar="NAME", help="the card, or several of one kind: 8xh100; without it there is no limit")
@option("--steps", type=INT, default=3, show_default=True, metavar="INT", help="optimizer steps; 0: until the program ends")
@option(
    "--world-size", type=INT, default=None, metavar="INT", help="ranks of the job; a launcher such as torchrun sets them itself"
)
@option("--rank", default="0", show_default=True, metavar="INT|all", help="the rank to play")
@option("--timeout", type=SECONDS, default=None, metavar="SECONDS", help="stop the program after this long")
@option(
    "--data",
    default=None,
    metavar="synthetic",
    help="synthetic rows for missing datasets; synthetic:COLUMN,COLUMN names their columns",
)
@option("--seq-len", type=INT, default=None, metavar="INT", help="tokens per synthetic row; default: 2048")
@option(
    "--max-host", default=None, metavar="SIZE", help="host memory for the program and its files; default: 80 % of free memory"
)
@option(
    "--routing",
    default="balanced",
    show_default=True,
    metavar="balanced|worst",
    help="tokens per MoE expert: the same number, or all",
)
@option("--keep-writes", is_flag=True, help="let the program write to your files")
@option("--network", is_flag=True, help="let the program use the network")
@option("--timeline", default=None, metavar="FILE", help="memory over time as FILE.png, .html, or .json (for replay)")
@option("--snapshot", default=None, metavar="FILE", help="save torch's memory snapshot, for pytorch.org/memory_viz")
@option(
    "--job",
    default=None,
    metavar="'MODEL …'",
    help="the job that the program trains, as options of `peftplan estimate`; prints the drift",
)
@option("--output", default=None, metavar="FILE", help="append the run's record to this file, for `peftplan check` (with --job)")
@option("--require-fit", is_flag=True, help="exit 1 unless the verdict is fits")
@options.format_option
def command(
    command: tuple[str, ...],
    gpu: str | None,
    steps: int,
    world_size: int | None,
    rank: str,
    timeout: float | None,
    data: str | None,
    seq_len: int | None,
    routing: str,
    max_host: str | None,
    keep_writes: bool,
    network: bool,
    timeline: str | None,
    snapshot: str | None,
    job: str | None,
    output: str | None,
    require_fit: bool,
    fmt: str,
) -> int:
    """Run a training program without a GPU, and read what it needs from torch's own allocator.

    COMMAND runs unchanged, on an emulated card whose kernels do nothing. Missing weights are replaced by sparse files,
    writes go to a scratch layer, and there is no network. The program ends after a few optimizer steps.

    Exit code: 0 after those steps or a normal end, 1 if memory or time ran out, else the program's own.

    \b
    peftplan rehearse --gpu rtx-4090 -- python train.py --batch_size 4
    peftplan rehearse --gpu 8xh100 -- torchrun --nproc-per-node 8 train.py
    """
    options.check_format(fmt)
    from peftplan.job.prepare import prepare
    from peftplan.rehearse import request, run
    from peftplan.report import render
    from peftplan.report.timeline import check, write

    if timeline is not None:
        check(timeline)
    if output is not None and job is None:
        raise InputError("--output", output, "a record states its job; accepted with --job 'MODEL …'")
    if job is not None:
        model, setup = job_of(job)
        prepare(model, **setup)  # before anything runs
    checked = request.read(
        command,
        gpu=gpu,
        steps=steps,
        world_size=world_size,
        rank=rank,
        timeout=timeout,
        max_host=max_host,
        keep_writes=keep_writes,
        network=network,
        snapshot=None if snapshot is None else Path(snapshot),
        record=timeline is not None,
        data=data,
        seq_len=seq_len,
        routing=routing,
    )
    _say_limits(checked)
    signal.signal(signal.SIGTERM, _told_to_end)
    result = run(checked, stdout=None if fmt == "table" else sys.stderr.fileno())
    if timeline is not None and result.recording is not None:
        write(result, timeline)
    fits = not require_fit or (bool(result.gpus) and all(verdict.verdict == "fits" for verdict in result.gpus))
    code = will_exit(result.exit_code if result.exit_code else 0 if fits else 1)
    if job is not None:
        _compare(model, setup, result, output)
    render.rehearsal(result, fmt=fmt)
    return code


def _say_limits(request: Request) -> None:
    """What a rehearsal may take of the host, before it starts."""
    files = (
        "what it writes to disk is not bounded" if request.keep_writes else "what it writes included; nothing is written to disk"
    )
    click.echo(f"peftplan: the program may take {format_bytes(request.max_host)} of host memory, {files}", err=True)


def _told_to_end(number: int, frame: FrameType | None) -> NoReturn:
    """End by an exception: the signal alone would leave the program's temporary folder behind."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def job_of(job: str) -> tuple[str, Mapping[str, object]]:
    """The model and the options of `peftplan estimate` that a job is spelled in."""
    from peftplan.cli.estimate import command as estimate

    raw = estimate.make_context("--job", shlex.split(job)).params
    model = raw["model"]
    if model is None:
        raise InputError("--job", job, "accepted: a model and the options of `peftplan estimate`")
    of_the_answer = inspect.signature(estimate.callback or job_of).parameters
    return model, options.chosen({name: value for name, value in raw.items() if name not in of_the_answer})


def _compare(model: str, setup: Mapping[str, object], result: Rehearsal, output: str | None) -> None:
    """Print the drift of the formulas, and append the record where it is wanted."""
    from peftplan.accuracy.jsonl import append
    from peftplan.measure import lines
    from peftplan.measure.rehearsed import record_of

    record = record_of(model, result, **setup)
    click.echo("\n".join(lines.of_record(record, lines.answers(record, ("analytic",)))), err=True)
    if output is not None:
        append(Path(output), [record])
        click.echo(f"{record.id} appended to {output}", err=True)
