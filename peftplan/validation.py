"""What pydantic found wrong, as one line: the field, what it must be, and the value."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from peftplan.errors import BoundError, InputError, MissingError, UnknownNameError
from peftplan.units import MIB

KINDS: Mapping[str, str] = {
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a string",
    "dict_type": "a mapping (JSON: {…})",
    "tuple_type": "a list",
    "list_type": "a list",
}
"""Types of pydantic's errors, and what is wanted then."""
BOUNDS: Mapping[str, Callable[[Mapping[str, object]], str]] = {
    "greater_than_equal": lambda bound: f"at least {bound['ge']}",
    "greater_than": lambda bound: f"above {bound['gt']}",
    "less_than_equal": lambda bound: f"at most {bound['le']:,}",
    "less_than": lambda bound: f"below {bound['lt']}",
}


SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,9})?) ?(tib|gib|mib|tb|gb|mb)?", re.IGNORECASE)
UNITS = {"tib": 2**40, "gib": 2**30, "mib": 2**20, "tb": 10**12, "gb": 10**9, "mb": 10**6, "": 1}


def size_in_bytes(value: object, *, field: str) -> int:
    """Bytes of a size such as `512GiB` or `512 GB`, at least 1 MiB; a bare number is bytes. Raises InputError."""
    text = SIZE.fullmatch(str(value).strip()) if isinstance(value, (int, str)) and not isinstance(value, bool) else None
    size = round(float(text[1]) * UNITS[(text[2] or "").lower()]) if text is not None else 0
    if not MIB <= size <= 2**60:
        raise InputError(field, value, "accepted: a size such as 512GiB, 512GB or a number of bytes, at least 1 MiB")
    return size


def paths(value: object, *, field: str) -> list[str | os.PathLike[str]]:
    """A path, or several, as a list. Raises BoundError for anything else."""
    several = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, os.PathLike, Mapping)) else [value]
    named = [path for path in several if isinstance(path, (str, os.PathLike))]
    if len(named) < len(several) or "" in named:
        raise BoundError(field, value, "a path or a list of paths")
    return named


def text(value: object, *, field: str) -> str:
    """A string as it is. Raises BoundError for anything else."""
    if not isinstance(value, str):
        raise BoundError(field, value, "a string")
    return value


def listed(value: object) -> object:
    """A comma-separated string as the names in it, with or without spaces around them; anything else as it is."""
    return tuple(name.strip(" ") for name in value.split(",")) if isinstance(value, str) else value


def no_switches(cls: type[BaseModel], values: Mapping[str, object]) -> None:
    """Raise BoundError for `True` or `False` where a field takes numbers and no switch, which pydantic reads as 1 or 0."""
    for name, value in values.items():
        if isinstance(value, bool) and (field := cls.model_fields.get(name)) is not None:
            kinds = set(_kinds(field.annotation))
            if kinds & {int, float} and bool not in kinds:
                raise BoundError(name, value, "a whole number" if int in kinds else "a number")


def _kinds(annotation: object) -> Iterator[object]:
    """The types in an annotation, unions and `Annotated` taken apart."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        for part in get_args(annotation):
            yield from _kinds(part)
    else:
        yield annotation


def first_error(
    error: ValidationError, *, prefix: str = "", nested: bool = True, missing: str = "it has no default"
) -> InputError:
    """The first of pydantic's errors. `nested`: a field of a field is named; `missing`: what is wrong where one is left out."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    if isinstance(cause := context.get("error"), InputError):
        return cause
    field = prefix + (".".join(str(part) for part in first["loc"][: None if nested else 1]) or "options")
    if first["type"] == "missing":
        return MissingError(field, missing)
    if first["type"] == "extra_forbidden":
        return InputError(field, first["input"], "there is no field of this name")
    if first["type"] == "literal_error":
        return UnknownNameError(field, first["input"], re.findall(r"'([^']*)'", context["expected"]))
    if (bound := BOUNDS.get(first["type"])) is not None:
        return BoundError(field, _number(first["input"]), bound(context))
    if (kind := KINDS.get(first["type"])) is not None:
        return BoundError(field, first["input"], kind)
    text = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").partition(", unable to")[0]
    return InputError(field, first["input"], text if "error" in context else f"accepted: {text}")


def _number(value: object) -> object:
    """The number that a text of the command line stands for, or the text: pydantic reads `0_-5` as an integer."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value
