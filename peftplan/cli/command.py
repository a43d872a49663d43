"""Commands of the command line: options under headings, other tools' words for them, and errors that name what was typed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, TypeVar

import click

from peftplan.cli.spellings import Translation, as_typed
from peftplan.errors import BoundError, PeftplanError
from peftplan.job.words import check_nodes

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    NumberType = click.ParamType[int | float]
else:
    NumberType = click.ParamType  # generic in the types of click alone

Decorated = TypeVar("Decorated", bound=Callable[..., object])
EXIT_CODE = "peftplan.exit_code"
"""Key of `Context.meta`: the code that holds even where the reader of the output goes early."""
HYPHEN = "\u2011"
"""Stands for a hyphen in help. Click would end a line behind one, as in trl-dpo; the whole word goes to the next line."""
TYPED = "peftplan.typed"
"""Key of `Context.meta`: parameter → how its option was typed."""
METHOD_HEADING = "Method"
"""Options under it are fields of a method, which a --peft-config can hold too."""
WIDEST = 80
"""Characters of the values that help shows beside an option."""
WHOLE_HELP = "peftplan.whole_help"
"""Key of `Context.meta`: whether help lists rare options too."""


class Option(click.Option):
    """An option that completes its values. Help shows it under its heading, and a `rare` one only in `--help-all`; `brief` is its
    text in `--help` where that is shorter."""

    heading = "Options"
    rare = False
    brief: str | None = None

    def make_metavar(self, *args: click.Context, **named: click.Context) -> str:
        """The values, or NAME where they are too many for a line; the option's text lists them then.

        From 8.2 on click hands over its context.
        """
        metavar = super().make_metavar(*args, **named)
        return metavar if len(metavar) <= WIDEST else "NAME"

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names that the option accepts."""
        from peftplan.cli.candidates import values

        return values(self.opts[0], self.metavar or "", incomplete)


def option(
    *names: str, heading: str = "Options", rare: bool = False, brief: str | None = None, **attributes: object
) -> Callable[[Decorated], Decorated]:
    """Add an option to a command, as `click.option` does."""
    return click.option(*names, cls=_listed(heading, rare, brief), **attributes)


@cache
def _listed(heading: str, rare: bool, brief: str | None) -> type[Option]:
    """The class of the options under a heading."""
    return type("Option", (Option,), {"heading": heading, "rare": rare, "brief": brief})


class Argument(click.Argument):
    """An argument that completes its values."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names that the argument accepts."""
        from peftplan.cli.candidates import values

        return values(f"{ctx.info_name} {self.name}", "", incomplete)


class Number(NumberType):
    """A number, at least `least`: what else is typed is an error in the words of the library."""

    name = "number"

    def __init__(self, kind: type[int] | type[float], accepted: str, *, least: int | None = None) -> None:
        self.kind, self.accepted, self.least = kind, accepted, least

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """The number. Raises BoundError."""
        name = param.opts[0] if param is not None else self.name
        try:
            number = self.kind(str(value))
        except ValueError:
            raise BoundError(name, value, self.accepted) from None
        if self.least is not None and number < self.least:
            raise BoundError(name, number, f"at least {self.least}")
        return number


INT = Number(int, "a whole number")
POSITIVE = Number(int, "a whole number", least=1)
SECONDS = Number(float, "a number")
argument = partial(click.argument, cls=Argument)


class HelpFormatter(click.HelpFormatter):
    """Writes help in which no word is parted at its hyphen."""

    def write_text(self, text: str) -> None:
        """Write a paragraph."""
        super().write_text(text.replace("-", HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write options, each with its text."""
        super().write_dl([(name, text.replace("-", HYPHEN)) for name, text in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        """All that was written."""
        return super().getvalue().replace(HYPHEN, "-")


class Context(click.Context):
    """A context whose help keeps words whole."""

    formatter_class = HelpFormatter


class Command(click.Command):
    """A command that shows its options under their headings and takes each of them once, in the words of any tool."""

    context_class = Context

    @cached_property
    def help_all(self) -> click.Option:
        """The switch `--help-all`."""
        return _help_all(hidden=not self.num_rare)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """All parameters: those of the command, `--help-all` and `--help`."""
        *own, brief = super().get_params(ctx)
        return [*own, self.help_all, brief]

    @property
    def num_rare(self) -> int:
        """How many options `--help` leaves to `--help-all`."""
        return sum(getattr(param, "rare", False) for param in self.params)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a section per heading."""
        whole = WHOLE_HELP in ctx.meta
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if not isinstance(param, click.Option) or (getattr(param, "rare", False) and not whole):
                continue
            if (record := param.get_help_record(ctx)) is not None:
                spelling, text = record
                text = text if whole else getattr(param, "brief", None) or text
                groups.setdefault(getattr(param, "heading", "Options"), []).append((spelling, text))
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)
        if self.num_rare and not whole:
            formatter.write_paragraph()
            formatter.write_text(f"{self.num_rare} more option{'s' * (self.num_rare > 1)}: {ctx.command_path} --help-all")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the notes that belong to the whole help."""
        if not self.num_rare or WHOLE_HELP in ctx.meta:
            super().format_epilog(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what was typed, once it is in our words. Raises RefusedError for two words that set one option."""
        if not ctx.resilient_parsing:  # completion reads what is not finished
            typed: dict[str, str] = ctx.meta.setdefault(TYPED, {})
            args = list(Translation(self.get_params(ctx), typed).of(args))
            check_nodes(typed, typed.get("nodes"))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command. An error names options as they were typed."""
        try:
            return super().invoke(ctx)
        except PeftplanError as error:
            raise PeftplanError(self._as_typed(ctx, error)) from None

    def _as_typed(self, ctx: click.Context, error: PeftplanError) -> str:
        """The line of an error: the field as it was typed, other fields as `--help` shows them."""
        typed: dict[str, str] = ctx.meta.get(TYPED, {})
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        spellings = {name: param.opts[0] for param in options for name in _names(param)}
        arguments = {
            name: param.human_readable_name.rstrip(".") for param in self.get_params(ctx) for name in _argument_names(param)
        }
        in_file = {name for param in options if getattr(param, "heading", "") == METHOD_HEADING for name in _names(param)}
        fields = {name: text for name, text in spellings.items() if "peft_config" not in typed or name not in in_file}
        words = [text.partition("=")[0] for text in ctx.params.get("set") or ()]
        if "--set" in spellings.values() and "peft_config" not in typed:
            from peftplan.job.options import MethodOptions

            fields = {name: f"--set {name}" for name in MethodOptions.__annotations__} | fields
        if "gpus" not in typed and "gpu" in typed:  # 7xl4
            fields = fields | {"gpus": "--gpu"}
        typed = typed | {word.replace("-", "_"): f"--set {word}" for word in words}
        return as_typed(error, arguments | fields | typed, spellings)


def _help_all(*, hidden: bool) -> click.Option:
    """The switch that prints help with the rare options; a command without any takes it for --help."""

    def show(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            ctx.meta[WHOLE_HELP] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    text = "Show every option and exit."
    return click.Option(["--help-all"], is_flag=True, expose_value=False, is_eager=True, callback=show, help=text, hidden=hidden)


def _names(param: click.Option) -> tuple[str, str]:
    """What the library calls an option: the parameter, and its longest spelling."""
    return str(param.name), param.opts[0].lstrip("-").replace("-", "_")


def _argument_names(param: click.Parameter) -> tuple[str, ...]:
    """What the library calls an argument; a file is one, whatever the function calls it."""
    if not isinstance(param, click.Argument):
        return ()
    return (str(param.name), *(("file",) if param.human_readable_name == "FILE" else ()))


def will_exit(code: int) -> int:
    """The exit code of a check that was made before its output is written: `| head` does not change what it says."""
    click.get_current_context().meta[EXIT_CODE] = code
    return code
