"""The content of a launch file: a mapping, from JSON or YAML that is parsed safely."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping

from peftplan import files
from peftplan.errors import InputError, OptionError

MOST_BYTES = 2**20
"""Launch files have a few KB."""
MOST_NODES = 10_000
"""Values of a YAML document, those behind aliases counted each time."""
TOO_DEEP = "it is nested too deeply; accepted: a file of fields with values"
ON = ("true", "yes", "on", "1")
OFF = ("false", "no", "off", "0")


def content(source: object, *, field: str) -> Mapping[str, object]:
    """The mapping in a launch file, or one that is source as such."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(field, source, "accepted: a path, or a mapping")
    text = files.text(os.fspath(source), field=field, most=MOST_BYTES)
    raw = _json(text, source, field) if text.lstrip().startswith("{") else _yaml(text, source, field)
    if not isinstance(raw, Mapping) or not all(isinstance(name, str) for name in raw):
        raise InputError(field, str(source), "accepted: a file of fields with values")
    return raw


def _json(text: str, source: object, field: str) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            twice = next(name for n, (name, _) in enumerate(pairs) if name in [other for other, _ in pairs[:n]])
            raise OptionError(field, str(source), f"{twice} appears twice")
        return fields

    try:
        return json.loads(text, object_pairs_hook=once)
    except InputError:
        raise
    except RecursionError:
        raise InputError(field, str(source), TOO_DEEP) from None
    except ValueError as error:
        raise InputError(field, str(source), f"not a JSON file: {error}") from None


def _yaml(text: str, source: object, field: str) -> object:
    import yaml  # only where YAML is read

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_nodes(root, source, field)
        return yaml.safe_load(text)
    except InputError:
        raise
    except RecursionError:
        raise InputError(field, str(source), TOO_DEEP) from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise InputError(field, str(source), f"not a YAML file: {where}{getattr(error, 'problem', None) or error}") from None


def _check_nodes(root: object, source: object, field: str) -> None:
    """Raise InputError for a key that appears twice, and for aliases that stand for too many nodes."""
    import yaml

    todo, seen = [root], 0
    while todo:
        node = todo.pop()
        seen += 1
        if seen > MOST_NODES:
            raise InputError(field, str(source), f"accepted: a file of at most {MOST_NODES:,} values")
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((key for n, key in enumerate(keys) if key in keys[:n]), None)
            if twice is not None:
                raise OptionError(field, str(source), f"line {node.start_mark.line + 1}: {twice} appears twice")
            todo += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value


def block(value: object, field: str) -> Mapping[str, object]:
    """The fields of a field; none where it is empty."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InputError(field, value, "accepted: fields and values")
    return value


def asks(value: object) -> bool:
    """Whether a field asks for anything."""
    if isinstance(value, Mapping):
        return any(asks(item) for item in value.values())
    return str(value).lower() not in ("", "no", "none", "false")


def switch(value: object, field: str) -> bool:
    text = str(value).lower()
    if text not in (*ON, *OFF):
        raise InputError(field, value, "accepted: true, false")
    return text in ON


def whole(value: object, field: str) -> int:
    """A whole number, which YAML and JSON also write as 5e8 or "5e8"."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except (TypeError, ValueError):
        raise InputError(field, value, "accepted: a whole number") from None
    if isinstance(value, bool) or not 0 <= number < math.inf or number != int(number):
        raise InputError(field, value, "accepted: a whole number")
    return int(number)
