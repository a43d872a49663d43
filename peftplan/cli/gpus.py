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
    from peftplan.planning.listings import matching_cards
    from peftplan.report import catalogues

    catalogues.gpus(matching_cards(pattern), fmt=fmt)
    return 0
