"""The location of the shipped data: `peftplan/data` in the wheel, `data/` beside the package in a checkout."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

Data = TypeVar("Data")

_PACKAGE = Path(__file__).resolve().parent
DATA = _PACKAGE / "data" if (_PACKAGE / "data").is_dir() else _PACKAGE.parent / "data"


def load(name: str, shape: type[Data]) -> Data:
    """The parsed JSON file `data/<name>`; treat it as read-only, it is read once per process.

    `shape` is its type for a type checker; tests read every file.
    """
    return cast("Data", parsed(name))


@cache
def parsed(name: str) -> object:
    """The parsed JSON file."""
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def record(make: Callable[..., Data], row: Mapping[str, object]) -> Data:
    """What a row of a data file describes: its fields are the arguments of `make`, lists as tuples."""
    return make(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})
