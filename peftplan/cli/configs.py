"""`peftplan configs PATH…`."""

from __future__ import annotations

import os

import click

from peftplan.cli import options
from peftplan.cli.command import POSITIVE, Command, argument, option


@click.command("configs", cls=Command)
@argument("paths", nargs=-1, required=True, metavar="PATH...")
@option("--gpu", default=None, metavar="NAME", help="a card, or several as 8xh100-80gb, for the verdicts")
@option("--engine", default="analytic", metavar="[analytic|trace]", show_default=True, help="what computes the peak")
@option("--tool", default=None, metavar="NAME", help="the tool of all files, if they do not show it")
@option("--online", is_flag=True, help="look up models on the Hub that are neither built in nor in the local cache")
@option(
    "--processes",
    type=POSITIVE,
    default=None,
    metavar="INT",
    help="number of processes that read the files  [default: one per core]",
)
@options.format_option
def command(
    paths: tuple[str, ...], gpu: str | None, engine: str, tool: str | None, online: bool, processes: int | None, fmt: str
) -> int:
    """Training configs of other tools, a line each: model, counts, peak, verdict, unsupported keys.

    PATH is a file, or a folder whose YAML, JSON, shell, Python and notebook files are read. Nothing in them is executed.

    \b
    peftplan configs examples/ --gpu a100-80gb
    peftplan configs axolotl.yml train.sh --format json
    """
    options.check_format(fmt)
    from peftplan.planning.configs import configs
    from peftplan.report import render

    listing = configs(paths, gpu=gpu, engine=engine, tool=tool, online=online, processes=processes or os.cpu_count() or 1)  # type: ignore[arg-type]
    render.configs(listing, fmt=fmt)
    return 0
