"""`peftplan advise [ABOUT]`."""

from __future__ import annotations

import click

from peftplan.cli import options
from peftplan.cli.command import Command, argument


@click.command("advise", cls=Command)
@argument("about", required=False)
@options.format_option
def command(about: str | None, fmt: str) -> int:
    """What papers and documentation recommend for rank, alpha, targets, dropout, learning rate and the choice of a method.

    ABOUT is a topic, a method or an option; without it everything is listed. Each recommendation names its source. None of it
    is computed: `peftplan estimate`, `fit` and `compare` say how much memory it takes.

    \b
    peftplan advise rank
    peftplan advise qlora
    """
    options.check_format(fmt)
    from peftplan.planning.practice import practices
    from peftplan.report import catalogues

    catalogues.practices(practices(about), fmt=fmt)
    return 0
