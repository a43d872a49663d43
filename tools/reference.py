"""Write docs/reference: every command from its help, Python from signatures and docstrings. `python -m tools.reference`."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import click

import peftplan
from peftplan.cli import COMMANDS, LazyGroup, cli
from peftplan.rehearse import rehearse
from peftplan.results.rehearsal import OutOfMemory, Rank, Rehearsal
from tools.reference_json import json_page

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
WRITTEN = "<!-- python -m tools.reference writes this page. -->"
RESULTS = (
    *("Estimate", "Peaks", "Verdict", "Fit", "Plan", "Binding", "Comparison", "Compared", "Sweep"),
    *("Exported", "Serving", "Inspection", "Diagnosis"),
)
"""The classes of results that the page explains, in its order; each is reached from what a public function returns."""
OF_HELP = "<!-- not run: part of the help; tests/cli/test_help.py runs its examples -->"
Object = type | Callable[..., object]


def pages() -> dict[str, str]:
    """File name under docs/reference → text."""
    group = {f"commands/{name}.md": command_page(name) for name in COMMANDS}
    return group | {"commands/index.md": commands_page(), "python.md": python_page(), "json.md": json_page()}


# Commands


def command(name: str) -> click.Command:
    """A command of the group, imported."""
    assert isinstance(cli, LazyGroup)
    loaded = cli.get_command(click.Context(cli, info_name="peftplan"), name)
    assert loaded is not None
    return loaded


def commands_page() -> str:
    """The list of commands."""
    rows = [f"| [`peftplan {name}`]({name}.md) | {text} |" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"{WRITTEN}\n\n# Commands\n",
            "Exit codes: 0 if the command succeeded, 1 if a check failed (`--require-fit`, `peftplan check`), 2 if the input is",
            "invalid. The line on stderr then names the option, the value and what is accepted.\n",
            "| command | what it answers |\n| --- | --- |",
            *rows,
            "",
        ]
    )


def command_page(name: str) -> str:
    """One command: usage, help, options under their headings."""
    loaded = command(name)
    ctx = click.Context(loaded, info_name=f"peftplan {name}")
    usage = " ".join([f"peftplan {name}", *loaded.collect_usage_pieces(ctx)])
    parts = [WRITTEN, f"# peftplan {name}", f"`{usage}`", *paragraphs(loaded.help or "")]
    groups: dict[str, list[str]] = {}
    for param in loaded.get_params(ctx):
        if isinstance(param, click.Option) and (record := param.get_help_record(ctx)) is not None:
            spelling, text = record
            groups.setdefault(getattr(param, "heading", "Options"), []).append(f"- `{spelling}`: {prose(text)}")
    for heading, options in groups.items():
        parts += [f"## {heading}", "\n".join(options)]
    if loaded.epilog:
        parts += ["## Notes", *paragraphs(loaded.epilog)]
    return "\n\n".join(parts) + "\n"


def paragraphs(text: str) -> Iterator[str]:
    """Click's help text as Markdown: what follows a backspace keeps its lines."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            yield f"{OF_HELP}\n```text\n{paragraph[1:].strip()}\n```"
        else:
            yield textwrap.fill(prose(" ".join(paragraph.split())), 125, break_long_words=False, break_on_hyphens=False)


def prose(text: str) -> str:
    """Text of help or a docstring as Markdown: what would be markup there is none here, and options are code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"(?<![\w-])(--[a-z][\w-]*)", r"`\1`", part.replace("<", "&lt;")) for part in parts[::2]]
    return "`".join(parts)


# Python


def python_page() -> str:
    """Every public name, and the classes of the results."""
    public = {name: getattr(peftplan, name) for name in peftplan.__all__ if not name.startswith("__")}
    public |= {"methods": peftplan.list_methods, "rehearse": rehearse}  # packages that can be called
    functions = {name: value for name, value in public.items() if inspect.isfunction(value)}
    errors = {name: value for name, value in public.items() if inspect.isclass(value) and issubclass(value, Exception)}
    classes = results(functions.values()) | {name: value for name, value in public.items() if inspect.isclass(value)}
    others = {name: value for name, value in classes.items() if name not in errors}
    others |= {value.__name__: value for value in (Rehearsal, Rank, OutOfMemory)}
    parts = [
        WRITTEN,
        "# Python",
        "`import peftplan` imports no heavy library, and not torch. Numbers are whole bytes, tokens and elements.",
        "## Functions",
        *(part for name, value in functions.items() for part in function(f"peftplan.{name}", value, level=3)),
        "## Results",
        *(part for name, value in others.items() for part in class_(name, value)),
        "## Errors",
        "Bad input raises one of these, each with a message of one line. All of them are subclasses of `PeftplanError`.",
        *(part for name, value in errors.items() for part in (f"### peftplan.{name}", *docstring(value))),
    ]
    return "\n\n".join(parts) + "\n"


def results(functions: object) -> dict[str, type]:
    """The classes of `RESULTS`, looked up by the names in annotations, function by function and class by class."""
    reached: dict[str, type] = {}
    ahead: list[tuple[str, str]] = [(value.__module__, value.__annotations__["return"]) for value in functions]  # type: ignore[attr-defined]
    while ahead:
        module, annotation = ahead.pop(0)
        for name in re.findall(r"\w+", str(annotation)):
            value = vars(sys.modules[module]).get(name)
            if inspect.isclass(value) and name in RESULTS and name not in reached:
                reached[name] = value
                ahead += [(value.__module__, text) for text in vars(value).get("__annotations__", {}).values()]
    missing = set(RESULTS) - reached.keys()
    assert not missing, f"no public function returns {missing}"
    return {name: reached[name] for name in RESULTS}


def function(name: str, value: Object, *, level: int) -> Iterator[str]:
    """A function or method: heading, signature, docstring."""
    yield f"{'#' * level} {name}"
    yield f"<!-- not run: a signature -->\n```python\n{signature(name, value)}\n```"
    yield from docstring(value)


def signature(name: str, value: Object) -> str:
    """A signature, one parameter a line where it is long. A default that is an object is `…`."""
    of_function = inspect.signature(value)
    parameters = [p for p in of_function.parameters.values() if p.name != "self"]
    lines = [str(p.replace(default="…")) if not plain(p.default) else str(p) for p in parameters]
    lines = [re.sub(r"'([^']*)'(?= = |$)", r"\1", text.replace("= '…'", "= …"), count=1) for text in lines]
    for index, parameter in enumerate(parameters):
        if parameter.kind is parameter.KEYWORD_ONLY:
            lines.insert(index, "*")
            break
    returns = f" -> {of_function.return_annotation}" if of_function.return_annotation is not inspect.Signature.empty else ""
    line = f"{name}({', '.join(lines)}){returns}"
    return line if len(line) <= 90 else f"{name}(\n" + "".join(f"    {text},\n" for text in lines) + f"){returns}"


def plain(default: object) -> bool:
    """Whether a default reads as code."""
    return default is inspect.Parameter.empty or default is None or isinstance(default, (bool, int, float, str, tuple))


def class_(name: str, value: type) -> Iterator[str]:
    """A class of results: docstring, what it holds, what it computes, its methods."""
    yield f"### {name}"
    yield from docstring(value)
    yield "\n".join(f"- `{field}`{f': {prose(text)}' if text else ''}" for field, text in members(value))
    for attribute, method in vars(value).items():
        if inspect.isfunction(method) and not attribute.startswith("_"):
            yield from function(f"{name}.{attribute}", method, level=4)


def members(value: type) -> Iterator[tuple[str, str]]:
    """Fields with the string below each, then properties with their docstring."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    assert isinstance(tree, ast.ClassDef)
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            yield f"{node.target.id}: {ast.unparse(node.annotation)}", " ".join(str(text).split())
    for attribute, member in list(vars(value).items()):  # pydantic completes a class on first use
        getter = getattr(member, "fget", None) or (getattr(member, "func", None) if "cached" in type(member).__name__ else None)
        if getter is not None and not attribute.startswith("_"):
            returned = getter.__annotations__.get("return", "")
            text = returned if isinstance(returned, str) else inspect.formatannotation(returned)
            yield f"{attribute}: {text}", " ".join((getter.__doc__ or "").split())


def docstring(value: object) -> Iterator[str]:
    """The paragraphs and lists of a docstring."""
    for paragraph in inspect.cleandoc(getattr(value, "__doc__", None) or "").split("\n\n"):
        items = re.split(r"\n(?=- )", paragraph)
        texts = (prose(" ".join(item.split())) for item in items)
        indent = "  " if paragraph.startswith("- ") else ""
        yield "\n".join(
            textwrap.fill(text, 125, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) for text in texts
        )


if __name__ == "__main__":
    (FOLDER / "commands").mkdir(parents=True, exist_ok=True)
    for file, text in pages().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
