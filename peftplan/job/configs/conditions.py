"""Whether conditions of a shell script hold, where its own variables decide: True, False, or None where they do not."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from peftplan.job.configs.shell_values import filled, words_of

TEST = re.compile(r"\s*(?:\[\[?\s|\(\(|test\s|(?:true|false|:)\s*$)|.*\]\]\s*$", re.DOTALL)
OF_NUMBERS = re.compile(r"\(\((.*?)(?:(==|!=|<=|>=|<|>)(.*))?\)\)", re.DOTALL)
NUMBER = re.compile(r"[-+]?\d{1,18}")
ORDERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq, "-ne": operator.ne, "-lt": operator.lt, "-le": operator.le, "-gt": operator.gt, "-ge": operator.ge,
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
"""What compares two numbers, in `[ ]` and in `(( ))`."""
PLAIN = {"true": True, ":": True, "false": False}
"""Commands that are conditions of their own."""


def is_test(command: str, variables: Mapping[str, str]) -> bool:
    """Whether a command does nothing but succeed or fail."""
    return TEST.match(command) is not None or filled(command, variables).strip() in PLAIN


def holds(command: str, variables: Mapping[str, str]) -> bool | None:
    """Whether a test succeeds."""
    text = filled(command.strip(), variables)
    if (numbers := OF_NUMBERS.fullmatch(text)) is not None:
        return _of_numbers(numbers, variables)
    if "$" in text or "`" in text:
        return None
    try:
        words = words_of(text)
    except ValueError:
        return None
    if len(words) == 1 and words[0] in PLAIN:
        return PLAIN[words[0]]
    takes_patterns = words[:1] != ["["] and words[:1] != ["test"] and not text.rstrip("] \t").endswith(("'", '"'))
    words = words[words[:1] in (["["], ["[["], ["test"]) : len(words) - (words[-1:] in (["]"], ["]]"]))]
    return _of_words(words, takes_patterns=takes_patterns)


def _of_words(words: Sequence[str], *, takes_patterns: bool) -> bool | None:
    for word, joined in (("-o", either), ("-a", both)):
        if word in words[1:-1]:
            at = words.index(word, 1)
            parts = (words[:at], words[at + 1 :])
            return joined(*(_of_words(part, takes_patterns=takes_patterns) for part in parts))
    match words:
        case ["!", *rest]:
            return opposite(_of_words(rest, takes_patterns=takes_patterns))
        case ["-z" | "-n" as sign, text]:
            return bool(text) == (sign == "-n")
        case [text]:
            return bool(text)
        case [first, "=" | "==" | "!=" as sign, second]:
            is_equal = fnmatchcase(first, second) if takes_patterns else first == second
            return is_equal == (sign != "!=")
        case [first, sign, second] if sign.startswith("-") and sign in ORDERS:
            numbers = (first, second)
            return ORDERS[sign](int(first), int(second)) if all(map(NUMBER.fullmatch, numbers)) else None
    return False if not words else None


def _of_numbers(match: re.Match[str], variables: Mapping[str, str]) -> bool | None:
    """`((X > 1))`."""
    totals = [filled(f"$(({side.strip()}))", variables) for side in (match[1], match[3] or "0")]
    return ORDERS[match[2] or "!="](*map(int, totals)) if all(map(NUMBER.fullmatch, totals)) else None


def matches(pattern: str, subject: str | None) -> bool | None:
    """Whether a branch of `case` is the one of a subject: patterns stand between bars."""
    result: bool | None = False
    for each in pattern.split("|"):
        text = each.strip().strip("'\"")
        is_open = subject is None or any(sign in text for sign in "$`(")
        result = either(result, True if text == "*" else None if is_open else fnmatchcase(subject or "", text))
    return result


def opposite(holds: bool | None) -> bool | None:
    """Whether it does not hold."""
    return None if holds is None else not holds


def both(first: bool | None, second: bool | None) -> bool | None:
    """Whether both hold."""
    return False if first is False or second is False else None if first is None or second is None else True


def either(first: bool | None, second: bool | None) -> bool | None:
    """Whether one holds."""
    return opposite(both(opposite(first), opposite(second)))
