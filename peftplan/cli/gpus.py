"""`peftplan gpus [PATTERN]`."""

from __future__ import annotations

import click

from peftplan.cli import options
from peftplan.cli.command import Command, argument


@click.command("gpus", cls=Command)
@argument("pattern", required=False)
@options.format_option
def command(pattern: str | None, fmt: str) -> int:
    """List the cards whose name or alias contains PATTERN: marketed size, nvidia-smi total, and what a program can get.

    \b
    peftplan gpus 4090
    peftplan gpus --format csv
    """
    options.check_format(fmt)
    from peftplan.hardware.gpus import gpus
    from peftplan.report import render

    wanted = (pattern or "").lower()
    cards = [gpu for gpu in gpus() if any(wanted in name.lower() for name in (gpu.id, gpu.name, *gpu.aliases))]
    render.gpus(cards, fmt=fmt)
    return 0
