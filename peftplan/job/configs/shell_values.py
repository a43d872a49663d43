"""The words of a shell command, and the values of the variables and sums in them."""

from __future__ import annotations

import operator
import re
import shlex
from collections.abc import Mapping

PIECES = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|(?<!\S)\#.*|.""", re.DOTALL)
"""Quoted texts, escaped characters, a comment, which begins at the start of a word, and all other characters."""
ELEMENTS = re.compile(r"\"?\$\{(\w+)\[[@*]\]\}\"?")
VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*|\d)(?::?[-=]([^}]*))?\}|\$([A-Za-z_]\w*|\d)")
ARITHMETIC = re.compile(r"\$\(\(([^()]*)\)\)|\$\(expr ([^()]*)\)")
NAME = re.compile(r"[A-Za-z_]\w*")
OF_SCRIPT = re.compile(
    r"""\$\(dirname (?:-- )?"?(?:\$\((?:readlink -f|realpath) (?:-- )?)?"?"""
    r"""\$(?:0|\{0\}|BASH_SOURCE|\{BASH_SOURCE(?:\[0\])?\})"?\)?"?\)"""
)
"""The folder of the script itself, which the paths of its commands start from here."""
ABSOLUTE = re.compile(r"""\$\((?:cd|realpath|readlink -f) (?:-- )?"?([^"'`$()&;>]+?)"?(?: *(?:&&|;) *pwd(?: -P)?)?\)""")
"""The full path of a folder."""
SUM = re.compile(r"\s*\d{1,9}(?:\s*[-+]\s*\d{1,9})*\s*|\s*\d{1,9}(?:\s*[*/]\s*\d{1,9})*\s*")
"""Numbers with operators of one precedence between them, so that they are taken from the left."""
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def filled(text: str, variables: Mapping[str, str]) -> str:
    """The text with its variables and its sums; what is not known stays as it is."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        default = match[2] if match[2] is not None else match[0]
        return variables.get(name, default) or (default if ":" in match[0][: len(name) + 3] else "")

    with_arrays = ELEMENTS.sub(lambda match: variables.get(match[1], match[0]), OF_SCRIPT.sub(".", text))
    with_values = ABSOLUTE.sub(r"\1", VARIABLE.sub(value, with_arrays))
    return ARITHMETIC.sub(lambda match: _total(match, variables), with_values)


def _total(match: re.Match[str], variables: Mapping[str, str]) -> str:
    """A sum, in which names need no `$`."""
    text = NAME.sub(lambda name: variables.get(name[0], name[0]), match[1] or match[2] or "")
    if not SUM.fullmatch(text):
        return match[0]
    result, *rest = re.findall(r"[-+*/]|\d+", text)
    result = int(result)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        if sign == "/" and int(number) == 0:
            return match[0]
        result = OPERATIONS[sign](result, int(number))
    return str(result)


def words_of(text: str) -> list[str]:
    """The words of a command; `#` in a word, as in `swift/self-cognition#500`, is part of it. Raises ValueError."""
    return shlex.split(PIECES.sub(lambda match: "" if match[0].startswith("#") and len(match[0]) > 1 else match[0], text))
