"""The lines of a shell script that run: commands with the lines that they continue on, without texts and functions."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from peftplan.job.configs.shell_values import words_of

INLINE = re.compile(r"`\s*#[^`]*`")
"""A comment between the lines of a command."""
COMMENT = re.compile(r"\s#[^'\"\\]*$")
MOST_LINES = 100
"""The most lines of a quoted text or an array."""
MOST_UNCLOSED = 20
"""The most quotes and brackets that nothing closes; lines behind so many are read one by one."""
MOST_FUNCTIONS = 200
HERE = re.compile(r"(?<!<)<<-?\s*(['\"\\]?)(\w+)\1(?!<)")
"""The beginning of lines that a command reads, up to one of this word alone."""
RUNS_TEXT = re.compile(
    r"(?:\s*(?:\S+=\S*\s+)*(?:sudo |exec |srun |env )*|.*\|\s*)(?:bash|sh|zsh|sbatch|qsub|ssh|docker|podman|kubectl)\b"
)
"""A command that runs a text as a script."""
WRITES = re.compile(r">|\btee\b")
INTO = re.compile(r"(?<![\d&])(>>?)\s*([^\s<>|&;]+)|\btee\s+(-a\s+)?([^\s<>|&;-][^\s<>|&;]*)")
"""The file into which a command writes, and whether it adds to it."""
FUNCTION = re.compile(r"(\s*)(?:function\s+([\w:-]+)\s*(?:\(\s*\))?|([\w:-]+)\s*\(\s*\))\s*\{?\s*(?:#.*)?")
QUOTING = re.compile(r"\s*(?:(?:export |local )?\w+=|(?::|echo|printf)\s)")
"""The beginning of a command that may hold a quoted text of several lines."""
ARGUMENT = re.compile(r"(?:^|\s)(?:--([A-Za-z][\w.-]*)|([A-Za-z_][\w.]*)=)")


class Line(NamedTuple):
    """A command, the number of its first line, and the lines of its arguments."""

    number: int
    text: str
    arguments: Mapping[str, int] = MappingProxyType({})


class Function(NamedTuple):
    """The number of its first line, and its lines."""

    number: int
    lines: list[str]


class Here(NamedTuple):
    """Lines of a script that a command writes into a file."""

    path: str
    lines: list[str]
    line: int
    """The number of the line before the first."""
    is_literal: bool
    """Whether its variables stay as they are."""
    adds: bool
    """Whether it adds to the file."""


class Script(NamedTuple):
    """What a script runs; what it writes into files; and its functions, by name. Lines keep their numbers.

    `files`: those that it writes, by the number of the command's line.
    """

    lines: list[str]
    written: list[str]
    functions: dict[str, Function]
    files: dict[int, Here]


def script_of(text: str) -> Script:
    """The parts of a script."""
    lines, written, into = _without_texts(INLINE.sub("", text).splitlines())
    return Script(*_without_functions(lines, written), into)


def _without_texts(lines: list[str]) -> tuple[list[str], list[str], dict[int, Here]]:
    """The lines without the texts that commands such as `cat <<EOF` are given; and those that go into a file."""
    runs, written, files = list(lines), [""] * len(lines), dict[int, Here]()
    ends = _places(line.strip() for line in lines)
    index = 0
    while index < len(lines):
        match = HERE.search(lines[index])
        if match is None or lines[index].lstrip().startswith("#"):
            index += 1
            continue
        start = index + 1
        end = _first(ends.get(match[2], ()), start)
        index = start if end is None else end + 1
        if end is None:
            continue
        runs[end] = ""
        if not RUNS_TEXT.match(lines[start - 1]):
            runs[start:end] = [""] * (end - start)
            if WRITES.search(lines[start - 1]):
                written[start:end] = lines[start:end]
                if (into := INTO.search(lines[start - 1])) is not None:
                    text = [line.lstrip("\t") for line in lines[start:end]] if "<<-" in match[0] else lines[start:end]
                    adds = into[1] == ">>" or bool(into[3])
                    files[start] = Here(into[2] or into[4], text, start, bool(match[1]), adds)
    return runs, written, files


def _without_functions(lines: list[str], written: list[str]) -> tuple[list[str], list[str], dict[str, Function]]:
    runs, functions = list(lines), dict[str, Function]()
    ends = _places(line.rstrip() for line in lines)
    index = count = 0
    while index < len(lines) and count < MOST_FUNCTIONS:
        match = FUNCTION.fullmatch(lines[index])
        start = index
        index += 1
        if match is None:
            continue
        end = _first(ends.get(f"{match[1]}}}", ()), index)
        if end is not None:
            count += 1
            body = [line.removeprefix("{") if at == 0 else line for at, line in enumerate(lines[index:end])]
            functions[match[2] or match[3]] = Function(index + 1, body)
            runs[start : end + 1] = [""] * (end + 1 - start)
            index = end + 1
    return runs, written, functions


def _places(lines: Iterable[str]) -> dict[str, list[int]]:
    """Line → where it stands, in order."""
    places: dict[str, list[int]] = {}
    for at, line in enumerate(lines):
        places.setdefault(line, []).append(at)
    return places


def _first(places: Sequence[int], start: int) -> int | None:
    """The first place from `start` on."""
    at = bisect_left(places, start)
    return places[at] if at < len(places) else None


def commands(script: list[str], first: int) -> Iterator[Line]:
    """Commands: lines with those that they continue on, without comments. `first`: the number of the first line."""
    lines = [(number, line) for number, line in enumerate(script, first) if line and not line.lstrip().startswith("#")]
    index, unclosed = 0, 0
    while index < len(lines):
        number, end = lines[index][0], index
        parts = [lines[index][1]]
        while end - index < MOST_LINES and end + 1 < len(lines) and _goes_on(parts, is_quoted=unclosed < MOST_UNCLOSED):
            end += 1
            parts.append(COMMENT.sub("", lines[end][1]))
        is_open = _goes_on(parts, is_quoted=unclosed < MOST_UNCLOSED)
        if is_open and not parts[0].rstrip().endswith("\\"):  # nothing closes its quote or bracket
            end, parts, unclosed = index, parts[:1], unclosed + 1
        arguments: Mapping[str, int] = MappingProxyType({})
        for part, (at, _) in zip(parts, lines[index : end + 1], strict=True):
            names = ((option or key).replace("-", "_") for option, key in ARGUMENT.findall(part))
            arguments = {**dict.fromkeys(names, at), **arguments}
        yield Line(number, " ".join(part.rstrip().removesuffix("\\") for part in parts), arguments)
        index = end + 1


def _goes_on(parts: list[str], *, is_quoted: bool) -> bool:
    """Whether a command goes on in the next line: behind a backslash or, with `is_quoted`, in a quoted text or an array."""
    if parts[-1].rstrip().endswith("\\") or not is_quoted:
        return parts[-1].rstrip().endswith("\\")
    text = " ".join(part.rstrip().removesuffix("\\") for part in parts)
    if re.match(r"\s*\w+\+?=\(", text) and not text.rstrip().endswith(")"):
        return True
    if not QUOTING.match(text):
        return False
    try:
        words_of(text)
    except ValueError:
        return True
    return False
