"""The small language of `PYTORCH_ALLOC_CONF`: `key:value` pairs separated by commas, a value may be a list `[a:b,c:d]`."""

from __future__ import annotations

import re

from peftplan.errors import InputError

Value = str | list[tuple[str, str]]
"""What follows a key: one word, or the pairs of a list."""

MOST_DIGITS = 15
MOST_OF_A_TEXT = 10_000
"""Characters; all options of torch together take a few hundred."""
_ITEM = re.compile(r"(?P<key>[^:,\[\]]+):(?:(?P<word>[^:,\[\]]+)|\[(?P<pairs>[^\[\]]*)\])(?:,|$)")
_WHITESPACE = re.compile(r"\s+")


def items(text: str) -> list[tuple[str, Value]]:
    """The options in order; whitespace is ignored, as torch does."""
    if len(text) > MOST_OF_A_TEXT:
        raise InputError("alloc_conf", text, f"accepted: at most {MOST_OF_A_TEXT} characters")
    rest = _WHITESPACE.sub("", text)
    options: list[tuple[str, Value]] = []
    while rest:
        match = _ITEM.match(rest)
        if match is None:
            raise InputError("alloc_conf", text, "accepted: key:value,key:value with lists as key:[size:value,...]")
        word = match["word"]
        options.append((match["key"], _pairs(match["key"], match["pairs"]) if word is None else word))
        rest = rest[match.end() :]
    return options


def whole_number(key: str, value: Value) -> int:
    """A decimal integer, unsigned."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= MOST_DIGITS:
        return int(value)
    raise InputError(key, value, f"accepted: a whole number of at most {MOST_DIGITS} digits")


def power_of_2(key: str, value: str) -> int:
    """1, 2, 4, …"""
    number = whole_number(key, value)
    if number.bit_count() != 1:
        raise InputError(key, value, "accepted: powers of 2")
    return number


def fraction(key: str, value: Value) -> float:
    """A decimal number from 0 to 1."""
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d*)?|\.\d+", value, re.ASCII) and float(value) <= 1:
        return float(value)
    raise InputError(key, value, "accepted: a decimal number from 0 to 1")


def flag(key: str, value: Value) -> bool:
    """`True` or `False`, spelled so."""
    if value in ("True", "False"):
        return value == "True"
    raise InputError(key, value, "accepted: True, False")


def _pairs(key: str, text: str) -> list[tuple[str, str]]:
    pairs = []
    for pair in text.split(",") if text else []:
        size, colon, number = pair.partition(":")
        if not (size and colon and number):
            raise InputError(key, text, "accepted: a list of size:value")
        pairs.append((size, number))
    return pairs
