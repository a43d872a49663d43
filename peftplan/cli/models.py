"""`peftplan models [PATTERN]`."""

from __future__ import annotations

import click

from peftplan.cli import options
from peftplan.cli.command import Command, argument


@click.command("models", cls=Command)
@argument("pattern", required=False)
@options.format_option
def command(pattern: str | None, fmt: str) -> int:
    """List the built-in models whose name, alias, id or model type contains PATTERN (`*` and `?` match as in a shell).

    \b
    peftplan models qwen3
    peftplan models 'llama-3.*' --format json
    """
    options.check_format(fmt)
    from peftplan.arch import catalogue
    from peftplan.report import catalogues

    catalogues.models(catalogue.models(pattern), fmt=fmt)
    return 0
