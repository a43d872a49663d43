"""`peftplan methods [NAME]`."""

from __future__ import annotations

import click

from peftplan.cli import options
from peftplan.cli.command import Command, argument


@click.command("methods", cls=Command)
@argument("name", required=False)
@options.format_option
def command(name: str | None, fmt: str) -> int:
    """List the PEFT methods with closed formulas, or the fields of one. Other peft types work through --peft-config.

    \b
    peftplan methods
    peftplan methods lora
    """
    options.check_format(fmt)
    from peftplan.report import catalogues

    if name is None:
        catalogues.methods(fmt=fmt)
    else:
        catalogues.method(name, fmt=fmt)
    return 0
