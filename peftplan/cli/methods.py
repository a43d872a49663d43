"""`peftplan methods [NAME]`."""

from __future__ import annotations

import click

from peftplan.cli import options


@click.command("methods")
@click.argument("name", required=False)
@click.option("--format", "fmt", default="table", metavar="NAME", show_default=True, help="table | json | csv | markdown")
def command(name: str | None, fmt: str) -> int:
    """List the PEFT methods with closed formulas, or the fields of one; --peft-config takes every other type of peft's."""
    options.check_format(fmt)
    from peftplan.report import render

    render.methods(name, fmt=fmt)
    return 0
