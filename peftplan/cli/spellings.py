"""Options as they are typed: other tools' words in ours, and errors that name what was typed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import click

from peftplan.errors import InputError, PeftplanError, UnknownNameError, UnknownOptionError, UnsupportedKeyError
from peftplan.job.words import MEANINGS, OFF, ON, REFUSED, our_value, refuse, twice


def as_typed(error: PeftplanError, fields: Mapping[str, str], spellings: Mapping[str, str]) -> str:
    """The line of an error. `fields`: what its field is called, `spellings`: what others that it mentions are called."""
    if isinstance(error, UnknownOptionError):
        dashed = {word: f"--{word.replace('_', '-')}" for word in MEANINGS} | dict(spellings)
        error.near = [dashed.get(name, f"--set {name}") for name in error.near]
    if isinstance(error, InputError):
        error.named(fields.get(error.field, error.field))
    if isinstance(error, UnknownOptionError):
        return str(error)
    field, colon, rest = str(error).partition(": ")
    text = f"{fields.get(field, field)}{colon}{rest}"
    in_file = isinstance(error, UnknownNameError) and ": " in error.field
    if in_file or isinstance(error, UnsupportedKeyError):  # a file has names of its own
        return text
    return _FIELD.sub(lambda match: spellings.get(match[0], match[0]), text)


_FIELD = re.compile(r"(?<!--set )(?<![\w'\"./`-])[a-z]+(?:_[a-z]+)+(?![\w'\"./(`:-])")
"""A name of the library in a sentence: two words or more, not quoted, no part of a path."""


class Translation:
    """The words of a command line as click's parser of one command knows them; `typed` is filled with what set each option."""

    def __init__(self, params: Iterable[click.Parameter], typed: dict[str, str]) -> None:
        options = [param for param in params if isinstance(param, click.Option)]
        self.by_spelling = {text: option for option in options for text in (*option.opts, *option.secondary_opts)}
        self.by_name = {str(option.name): option for option in options}
        self.typed = typed

    def of(self, args: Iterable[str]) -> Iterator[str]:
        """Each word of the command line, options in our spelling."""
        rest = list(args)
        while rest:
            word = rest.pop(0)
            if word == "--":
                yield from (word, *rest)
                return
            yield from self._option(word, rest) if word.startswith("--") else (word,)

    def _option(self, word: str, rest: list[str]) -> Iterator[str]:
        typed, equals, value = word.partition("=")
        spelling = "--" + typed[2:].replace("_", "-")
        name = typed[2:].replace("-", "_")
        attached = value if equals else None
        if (option := self.by_spelling.get(spelling)) is not None:
            yield from self._ours(option, spelling, typed, attached, rest)
        elif name in REFUSED:
            refuse(name, typed, (_next(rest, (*ON, *OFF)) or "true") if attached is None else attached)
        elif name in MEANINGS and (option := self.by_name.get(MEANINGS[name].option)) is not None:
            yield from self._theirs(option, name, typed, attached, rest)
        else:
            yield word  # click says that there is no such option

    def _ours(self, option: click.Option, spelling: str, typed: str, attached: str | None, rest: list[str]) -> Iterator[str]:
        if option.is_flag:
            attached = _next(rest, ("true", "false")) if attached is None else attached
            on = attached is None or attached.lower() in ON
            if attached is not None and attached.lower() not in (*ON, *OFF):
                raise InputError(typed, attached, "accepted: true, false")
            if on or option.secondary_opts:
                self._set_by(option, typed)
                yield spelling if on else _other(option, spelling)
            return
        self._set_by(option, typed)
        yield spelling if attached is None else f"{spelling}={attached}"
        if attached is None and rest:
            yield rest.pop(0)

    def _theirs(self, option: click.Option, name: str, typed: str, attached: str | None, rest: list[str]) -> Iterator[str]:
        meaning = MEANINGS[name]
        if attached is None and meaning.switch:
            attached = _next(rest, (*meaning.values, *ON, *OFF)) or "true"
        elif attached is None:
            if not rest:
                raise click.BadOptionUsage(typed, f"Option '{typed}' requires an argument.")
            attached = rest.pop(0)
        value = our_value(name, typed, attached)
        if value is None:
            return
        self._set_by(option, typed)
        if option.is_flag:
            yield option.opts[0] if value is True else _other(option, option.opts[0])
        else:
            yield f"{option.opts[0]}={value}"

    def _set_by(self, option: click.Option, typed: str) -> None:
        name = str(option.name)
        if option.multiple or (option.is_flag and self.typed.get(name) == typed):
            self.typed[name] = typed
            return
        if name in self.typed:
            raise twice(self.typed[name], typed)
        self.typed[name] = typed


def _next(rest: list[str], values: Iterable[str]) -> str | None:
    """The next word where it is one of the values, taken out of the rest."""
    return rest.pop(0) if rest and rest[0].lower() in values else None


def _other(option: click.Option, spelling: str) -> str:
    """The other half of a switch."""
    return option.secondary_opts[0] if spelling in option.opts else option.opts[0]
