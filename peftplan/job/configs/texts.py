"""The values of a file → its text: YAML, a shell command, a Python script or JSON, with comments where the format has them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from peftplan.job.configs.documents import Call, Document, Values, nested
from peftplan.job.configs.facts import Facts

WIDTH = 120
"""The widest comment before it is broken into lines."""


class Parts(NamedTuple):
    """What a text is made of: comments of its beginning, values under dotted keys, comments of keys."""

    header: Sequence[str]
    values: Values
    comments: Mapping[str, str]


def document_of(values: Values, tool: Facts, *, comments: str = "") -> Document:
    """The values as the reader sees them."""
    kind = tool.write.get("format", "yaml")
    if kind == "python":
        calls = [
            Call(
                call=call,
                args=[kwargs["0"]] if "0" in kwargs else [],
                kwargs={name: value for name, value in kwargs.items() if name != "0"},
            )
            for call, kwargs in _calls(values, tool)
        ]
        return Document({"calls": calls}, kind="calls", comments=comments)
    program = tool.write.get("program", "")
    return Document(nested(values), kind="command" if program else "values", program=program, comments=comments)


def text_of(parts: Parts, tool: Facts, *, environment: Mapping[str, int] | None = None) -> str:
    """The text of a tool's file. `environment`: what a shell command sets before it."""
    kind = tool.write.get("format", "yaml")
    if kind == "json":
        return json.dumps(nested(parts.values), indent=2) + "\n"
    body = {"yaml": _yaml, "shell": _shell, "python": _python}[kind]
    lines = [f"# {line}" for comment in parts.header for line in _broken(comment)]
    first = ["#!/bin/sh"] if kind == "shell" else []
    return "\n".join([*first, *lines, "", *body(parts, tool, environment or {})]).rstrip() + "\n"


def _broken(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) or [""]


def _yaml(parts: Parts, tool: Facts, environment: Mapping[str, int]) -> Iterator[str]:
    yield from _mapping(nested(parts.values), parts.comments, "", "")


def _mapping(tree: Values, comments: Mapping[str, str], above: str, indent: str) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{above}{name}"
        comment = f"  # {comments[key]}" if key in comments else ""
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:{comment}"
            yield from _mapping(value, comments, f"{key}.", f"{indent}  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{name}:{comment}"
            for each in value:
                lines = list(_mapping(each, {}, "", f"{indent}    "))
                yield from (f"{indent}  - {lines[0].lstrip()}", *lines[1:])
        else:
            yield f"{indent}{name}: {_scalar(value)}{comment}"


def _scalar(value: object) -> str:
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, width=2**31, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _shell(parts: Parts, tool: Facts, environment: Mapping[str, int]) -> Iterator[str]:
    before = "".join(f"{name}={number} " for name, number in environment.items())
    arguments = [f"--{key} {_words(value)}" for key, value in nested(parts.values).items()]
    yield from (f"{line} \\" for line in [f"{before}{tool.write['program']}", *(f"    {each}" for each in arguments[:-1])])
    yield f"    {arguments[-1]}"


def _words(value: object) -> str:
    if isinstance(value, (bool, type(None))):
        return str(value).lower()
    if isinstance(value, Mapping):
        return shlex.quote(json.dumps(value))
    return " ".join(shlex.quote(str(each)) for each in (value if isinstance(value, list) else [value]))


def _python(parts: Parts, tool: Facts, environment: Mapping[str, int]) -> Iterator[str]:
    calls = list(_calls(parts.values, tool))
    body = [line for call, kwargs in calls for line in _call(call, kwargs, parts, tool)]
    used = {name for name in tool.write["imports"] if any(re.search(rf"\b{name}\b", line) for line in body)}
    if any("torch." in line for line in body):
        yield from ("import torch",)
    for package in sorted({tool.write["imports"][name] for name in used}):
        yield f"from {package} import {', '.join(sorted(name for name in used if tool.write['imports'][name] == package))}"
    yield from ("", *body, f"{_variable(calls[-1][0], tool)}.train()")


def _calls(values: Values, tool: Facts) -> Iterator[tuple[str, Values]]:
    """The calls of a script with their arguments, in the order of the data file."""
    for prefix, call in tool.write["calls"].items():
        arguments = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{prefix}.")}
        arguments.pop("call", None)
        if arguments or f"{prefix}.call" in values:
            yield call, nested(arguments)


def _variable(call: str, tool: Facts) -> str:
    prefix = next(prefix for prefix, name in tool.write["calls"].items() if name == call)
    return tool.write["names"][prefix]


def _call(call: str, kwargs: Values, parts: Parts, tool: Facts) -> Iterator[str]:
    prefix = next(prefix for prefix, name in tool.write["calls"].items() if name == call)
    yield f"{_variable(call, tool)} = {call}("
    for name, value in kwargs.items():
        comment = f"  # {parts.comments[f'{prefix}.{name}']}" if f"{prefix}.{name}" in parts.comments else ""
        yield f"    {'' if name == '0' else f'{name}='}{_literal(value)},{comment}"
    yield ")"


def _literal(value: object) -> str:
    """A value as Python; `<torch.bfloat16>` is an expression."""
    if isinstance(value, str) and value.startswith("<") and value.endswith(">"):
        return value[1:-1]
    return json.dumps(value) if isinstance(value, str) else repr(value)
