"""`peftplan completion SHELL`."""

from __future__ import annotations

import click

from peftplan.cli.command import Command, argument
from peftplan.errors import RefusedError, UnknownNameError

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_PEFTPLAN_COMPLETE"
"""The environment variable by which the script asks for what completes a line; click reads it under this name."""


@click.command("completion", cls=Command)
@argument("shell", required=False)
def command(shell: str | None) -> int:
    """Print a script that makes SHELL (bash, zsh or fish) complete commands, options, models, cards, methods and optimizers.

    \b
    eval "$(peftplan completion bash)"          # in ~/.bashrc; the same for zsh in ~/.zshrc
    peftplan completion fish > ~/.config/fish/completions/peftplan.fish
    """
    if shell is None:
        raise RefusedError(f"SHELL is missing: name a shell; accepted: {', '.join(SHELLS)}")
    if shell not in SHELLS:
        raise UnknownNameError("shell", shell, SHELLS)
    from click.shell_completion import ShellComplete, get_completion_class

    from peftplan.cli import cli

    script_of = get_completion_class(shell)
    assert script_of is not None
    click.echo(ShellComplete.source(script_of(cli, {}, "peftplan", VARIABLE)))  # no look at the version of the shell
    return 0
