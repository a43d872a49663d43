"""`peftplan rehearse -- COMMAND`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from peftplan.cli import options
from peftplan.cli.command import Command, argument, option, will_exit


@click.command("rehearse", cls=Command)
@argument("command", nargs=-1, type=click.UNPROCESSED)
@option("--gpu", default=None, metavar="NAME", help="the card, or several of one kind: 8xh100; without it there is no limit")
@option("--steps", type=int, default=3, show_default=True, metavar="INT", help="optimizer steps; 0: until the program ends")
@option(
    "--world-size", type=int, default=None, metavar="INT", help="ranks of the job; a launcher such as torchrun says them itself"
)
@option("--rank", default="0", show_default=True, metavar="INT|all", help="the rank to play")
@option("--timeout", type=float, default=None, metavar="SECONDS", help="stop the program after this long")
@option("--max-host", default=None, metavar="SIZE", help="host memory for what it writes (80 % of what is free)")
@option("--keep-writes", is_flag=True, help="let the program write to your files")
@option("--network", is_flag=True, help="let the program use the network")
@option("--snapshot", default=None, metavar="FILE", help="save torch's memory snapshot, for pytorch.org/memory_viz")
@option("--require-fit", is_flag=True, help="exit 1 unless the verdict is fits")
@options.format_option
def command(
    command: tuple[str, ...],
    gpu: str | None,
    steps: int,
    world_size: int | None,
    rank: str,
    timeout: float | None,
    max_host: str | None,
    keep_writes: bool,
    network: bool,
    snapshot: str | None,
    require_fit: bool,
    fmt: str,
) -> int:
    """Run a training program without a GPU, and read what it needs from torch's own allocator.

    COMMAND runs as it is, on an emulated card whose kernels do nothing. Weights that are not there become holes; what it writes
    goes to a scratch layer; it has no network. It ends after a few optimizer steps.

    Exit code: 0 after those steps or the program's own end, 1 if it ran out of memory, else the program's own.

    \b
    peftplan rehearse --gpu rtx-4090 -- python train.py --batch_size 4
    peftplan rehearse --gpu 8xh100 -- torchrun --nproc-per-node 8 train.py
    """
    options.check_format(fmt)
    from peftplan.rehearse import rehearse
    from peftplan.report import render

    as_json = fmt == "json"
    result = rehearse(
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
        stdout=sys.stderr.fileno() if as_json else None,
    )
    fits = not require_fit or (bool(result.gpus) and all(verdict.verdict == "fits" for verdict in result.gpus))
    code = will_exit(result.exit_code if result.exit_code else 0 if fits else 1)
    render.rehearsal(result, fmt=fmt)
    return code
