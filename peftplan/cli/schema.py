"""`peftplan schema [NAME]`."""

from __future__ import annotations

import json

import click

from peftplan.cli import options
from peftplan.cli.command import Command, argument
from peftplan.errors import RefusedError


@click.command("schema", cls=Command)
@argument("name", required=False)
@options.format_option
def command(name: str | None, fmt: str) -> int:
    """Print the JSON Schema of what a command prints with --format json, or list what has one.

    \b
    peftplan schema
    peftplan schema estimate > estimate.schema.json
    """
    options.check_format(fmt)
    if name is not None and fmt not in ("table", "json"):
        raise RefusedError(f"--format: a schema is JSON (got {fmt}); only the list of all has other formats")
    from peftplan.report import catalogues
    from peftplan.report.schema import json_schema

    if name is None:
        catalogues.schemas(fmt=fmt)
    else:
        click.echo(json.dumps(json_schema(name), indent=2, ensure_ascii=False))
    return 0
