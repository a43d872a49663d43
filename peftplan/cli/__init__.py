"""The command line: a lazy click group, one file per command, no logic. Exit codes: 0, 1 for a failed check, 2 for bad input."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from peftplan.errors import PeftplanError

COMMANDS: dict[str, str] = {
    "estimate": "What a fine-tuning run needs: counts, bytes, verdicts.",
    "fit": "The largest batch, sequence or rank that fits a card, other plans, or the smallest card.",
    "compare": "One job with several methods, on several cards.",
    "export": "A job as the config of axolotl, LLaMA-Factory, TRL, torchtune, ms-swift, accelerate or DeepSpeed.",
    "configs": "Training configs of other tools, one line each: peak, verdict, unsupported keys.",
    "sweep": "A job at every point of a grid, as CSV, JSON lines or Parquet, and as a map.",
    "explain-oom": "Why a program ran out of memory, from its message, a log or a snapshot, and what to try.",
    "advise": "What papers and documentation recommend: rank, targets, learning rate, which method.",
    "serve": "What comes after training: adapter file, merge, merged model, serving with a KV cache.",
    "replay": "Replay a recorded run through a model of torch's allocator, with less memory or other options.",
    "inspect": "The module tree of a model: shapes, counts, bytes, and what a pattern matches.",
    "models": "The built-in models and their parameter counts.",
    "methods": "The PEFT methods, and the fields of one.",
    "rehearse": "Run a training program without a GPU, and read its peaks from torch's own allocator.",
    "measure": "Measure a run with random weights on this machine's GPU, and record it.",
    "gpus": "The GPU catalogue: what each card has, and what a program can use.",
    "schema": "The JSON Schema of what a command prints with --format json.",
    "completion": "Print a script that completes commands, options and names in your shell.",
    "check": "Compare the engines with measured runs: drift, verdicts, and what changed.",
}
"""Commands and their one-line help; the module `peftplan.cli.<name>` is imported when its command runs."""

MOST_OF_A_LINE = 1000
"""Characters of what is written to stderr, `peftplan: ` and the line end included."""


class ReaderGoneError(Exception):
    """Nobody reads what is left of the output; `code` is what a check had found before."""

    def __init__(self, code: int = 0) -> None:
        super().__init__()
        self.code = code


@contextmanager
def _reader_may_go(ctx: click.Context | None = None) -> Iterator[None]:
    """A broken pipe under a name that click does not know: it would exit with 1, which is a failed check here."""
    try:
        yield
    except BrokenPipeError:
        from peftplan.cli.command import EXIT_CODE

        raise ReaderGoneError(ctx.meta.get(EXIT_CODE, 0) if ctx else 0) from None


def _no_command(name: str) -> PeftplanError:
    """The error for a word that is no command; a model or a file most likely lacks one."""
    from peftplan.arch import catalogue
    from peftplan.errors import InputError, UnknownNameError, nearest

    if not nearest(name, list(COMMANDS)) and catalogue.spelled(name) is not None:
        return InputError("command", name, f"it is a model; did you mean peftplan estimate {name}?")
    if os.path.isfile(name):
        of_model = "" if os.path.basename(name) == "config.json" else "--config "
        return InputError("command", name, f"it is a file; did you mean peftplan estimate {of_model}{name}?")
    return UnknownNameError("command", name, COMMANDS)


class LazyGroup(click.Group):
    """Imports a command's module only when that command is asked for, so that `--help` starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The commands, without importing any."""
        from click.shell_completion import CompletionItem

        items = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return items or super().shell_complete(ctx, incomplete)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            raise _no_command(cmd_name)
        command: click.Command = import_module(f"peftplan.cli.{cmd_name.replace('-', '_')}").command
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        with _reader_may_go():  # `--help` prints while options are read
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> object:
        with _reader_may_go(ctx):
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="peftplan")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """peftplan tells you what a fine-tuning run needs before you rent a GPU.

    \b
    peftplan estimate llama-3.1-8b --method qlora --gpu rtx-4090
    peftplan fit llama-3.1-8b --gpu rtx-4090

    `peftplan COMMAND --help` explains a command.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: list[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2, never with a traceback."""
    from peftplan.errors import PeftplanError

    if sys.stdout is None:  # closed (`>&-`)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console without `×` gets a question mark, not a traceback
    code: object = 0
    try:
        code = cli.main(args=args, prog_name="peftplan", standalone_mode=False)
        sys.stdout.flush()
    except PeftplanError as error:
        _stop(str(error))
    except click.NoSuchOption as error:
        from peftplan.errors import nearest

        names = [name.lstrip("-") for name in error.possibilities or ()]  # click compares the dashes too, which all have
        alike = [f"--{name}" for name in nearest(error.option_name.lstrip("-"), names)]
        near = f"; did you mean {' or '.join(alike)}?" if alike else ""
        near = "; `peftplan estimate` and `peftplan export` take it" if error.option_name == "--config" else near
        from peftplan.job.words import NO_EFFECT, without_effect

        if without_effect(error.option_name.lstrip("-").replace("-", "_")):
            _stop(f"{error.option_name}: {NO_EFFECT}")
        _stop(f"no such option: {error.option_name}{near} (see --help)")
    except click.MissingParameter as error:
        _stop(f"{error.param.human_readable_name if error.param else 'an argument'} is missing (see --help)")
    except click.ClickException as error:
        message = error.format_message().rstrip(".")
        if message.startswith("Got unexpected extra argument"):
            extra = message.partition("(")[2].rstrip(")")
            message = f"no place for {extra}: quote a name with spaces; `peftplan sweep A,B` takes several models"
        _stop(f"{message} (see --help)")
    except (click.Abort, KeyboardInterrupt) as stopped:
        where = str(stopped.__cause__ or stopped)
        click.echo(f"peftplan: interrupted{where and ' '}{where}", err=True)
        sys.exit(130)
    except (ReaderGoneError, BrokenPipeError) as gone:
        # The reader has gone (`peftplan models | head`); keep the interpreter from flushing into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = gone.code if isinstance(gone, ReaderGoneError) else code
    except OSError as error:  # a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _stop(f"{error.filename or 'output'}: {error.strerror}")
    except MemoryError:
        _stop("out of memory: the input is larger than this process can hold")
    sys.exit(code if isinstance(code, int) else 0)


def run() -> None:
    """The console script: a short process, whose few cycles are not worth the collector's time (a fifth of a cold start)."""
    gc.disable()
    if "rehearse" not in sys.argv:  # whose program inherits the environment
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # or pydantic looks for them in every installed package
    try:
        main()
    finally:
        if "torch" not in sys.modules:  # what torch binds is released by that last look, or newer releases list it as leaked
            gc.freeze()  # nor is the last look, at exit, which nothing else turns off


def _stop(message: str) -> None:
    from peftplan.errors import one_line

    click.echo(one_line(f"peftplan: {message}", most=MOST_OF_A_LINE - len("\n")), err=True)
    sys.exit(2)
