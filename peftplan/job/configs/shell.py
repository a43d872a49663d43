"""Training commands in a shell script: read, never run. Variables that the script sets, and its arithmetic, are filled in."""

from __future__ import annotations

import operator
import re
import shlex
from collections.abc import Iterator, Mapping

from peftplan.job.configs.documents import BrokenFileError, Document, as_number

PROGRAMS = (
    ("swift", 1), ("megatron", 1), ("trl", 1), ("llamafactory-cli", 1), ("axolotl", 1), ("tune", 2),
    ("accelerate", 1), ("torchrun", 0), ("deepspeed", 0), ("python", 0), ("python3", 0),
)  # fmt: skip
"""Programs that begin a training command, and how many words after them are part of its name."""
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}|\$([A-Za-z_]\w*)")
ARITHMETIC = re.compile(r"\$\(\(([^()]*)\)\)|\$\(expr ([^()]*)\)")
SUM = re.compile(r"\s*\d{1,9}(?:\s*[-+]\s*\d{1,9})*\s*|\s*\d{1,9}(?:\s*[*/]\s*\d{1,9})*\s*")
"""Numbers with operators of one precedence between them, so that they are taken from the left."""
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
MOST_COMMANDS = 200


def of_shell(text: str, *, file: str) -> Document:
    """The first training command of a script. Raises BrokenFileError if there is none."""
    commands = list(commands_of(text, file=file))
    if not commands:
        raise BrokenFileError(file, None, "accepted: a script with a training command, such as swift sft, trl sft or torchrun")
    return commands[0]


def commands_of(text: str, *, file: str) -> Iterator[Document]:
    """Every training command of a script, with the variables that were set before it."""
    variables: dict[str, str] = {}
    count = 0
    for number, line in _lines(text):
        try:
            words = shlex.split(_filled(line, variables), comments=True)
        except ValueError as error:
            if any(line.lstrip().startswith(name) for name, _ in PROGRAMS):
                raise BrokenFileError(file, number, f"not a shell command: {error}") from None
            continue
        environment: dict[str, str] = {}
        while words and (match := ASSIGNMENT.fullmatch(words[0])):
            environment[match[1]] = match[2]
            words.pop(0)
        if words[:1] == ["export"]:
            variables |= {match[1]: match[2] for word in words[1:] if (match := ASSIGNMENT.fullmatch(word))}
            continue
        if not words:
            variables |= environment
            continue
        if (name := _program(words)) is not None and count < MOST_COMMANDS:
            count += 1
            program, rest = name
            if values := _arguments(rest):
                yield Document(values, {}, "command", program, {**variables, **environment})


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with those that they continue on, and the number of the first; comments between them are left out."""
    parts: list[str] = []
    start = 1
    for number, line in enumerate(text.splitlines(), 1):
        if parts and line.lstrip().startswith("#"):
            continue
        if not parts:
            start = number
        parts.append(line.rstrip().removesuffix("\\"))
        if not line.rstrip().endswith("\\"):
            yield start, " ".join(parts)
            parts = []
    if parts:
        yield start, " ".join(parts)


def _filled(text: str, variables: Mapping[str, str]) -> str:
    """The text with its variables and its sums; what is not known stays as it is."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return variables.get(name, match[2] if match[2] is not None else match[0])

    def total(match: re.Match[str]) -> str:
        text = match[1] or match[2] or ""
        if not SUM.fullmatch(text):
            return match[0]
        result, *rest = re.findall(r"[-+*/]|\d+", text)
        result = int(result)
        for sign, number in zip(rest[::2], rest[1::2], strict=True):
            if sign == "/" and int(number) == 0:
                return match[0]
            result = OPERATIONS[sign](result, int(number))
        return str(result)

    return ARITHMETIC.sub(total, VARIABLE.sub(value, text))


def _program(words: list[str]) -> tuple[str, list[str]] | None:
    """The training program that a command runs, with its script, and its arguments."""
    first = words[0].rpartition("/")[2]
    for name, more in PROGRAMS:
        if first == name:
            script = next(([word] for word in words[1 + more :] if word.endswith(".py")), [])
            return " ".join([name, *words[1 : 1 + more], *script]), words[1 + more :]
    return None


def _arguments(words: list[str]) -> dict[str, object]:
    """`--key value…`, `--key=value`, `--switch` and `key=value` → values; a word before them is the script."""
    values: dict[str, list[str]] = {}
    key: str | None = None
    for word in words:
        if re.fullmatch(r"[|&;>]+|\d?>&?\d?", word):
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            values[key] = [value] if equals else []
        elif key is None and (match := re.fullmatch(r"([A-Za-z_][\w.]*)=(.*)", word)):
            values[match[1]] = [match[2]]
        elif key is not None:
            values[key].append(word)
    return {name: _value(texts) for name, texts in values.items()}


def _value(texts: list[str]) -> object:
    parsed = [_scalar(text) for text in texts]
    return True if not parsed else parsed[0] if len(parsed) == 1 else parsed


def _scalar(text: str) -> object:
    word = text.lower()
    if word in ("true", "false"):
        return word == "true"
    if word in ("none", "null"):
        return None
    if re.fullmatch(r"[-+]?\d{1,18}", text):
        return int(text)
    if re.fullmatch(r"[-+]?\d*\.\d+", text):
        return float(text)
    return as_number(text)
