"""`${key}` in a value → the value of that key in the same file; what the environment or a program fills in stays as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")
MOST_STEPS = 5
"""References that lead to references."""
MOST_OF_A_TEXT = 10_000


def resolved(values: dict[str, object]) -> dict[str, object]:
    """The values with the references that the file itself answers."""
    return {key: _resolved(value, values, 0) for key, value in values.items()}


def _resolved(value: object, values: Mapping[str, object], steps: int) -> object:
    if isinstance(value, Mapping):
        return {key: _resolved(each, values, steps) for key, each in value.items()}
    if isinstance(value, list):
        return [_resolved(each, values, steps) for each in value]
    if not isinstance(value, str) or "${" not in value or steps > MOST_STEPS:
        return value
    whole = REFERENCE.fullmatch(value)
    if whole:
        answer = _lookup(values, whole[1])
        return value if answer is None or isinstance(answer, Mapping) else _resolved(answer, values, steps + 1)
    text = REFERENCE.sub(lambda match: _text(_lookup(values, match[1]), match[0]), value)
    return value if len(text) > MOST_OF_A_TEXT else text if text == value else _resolved(text, values, steps + 1)


def _text(answer: object, otherwise: str) -> str:
    return str(answer) if isinstance(answer, (str, int, float)) else otherwise


def _lookup(values: Mapping[str, object], dotted: str) -> object:
    value: object = values
    for name in dotted.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value
