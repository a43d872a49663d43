"""The event log of a traced run: what was allocated and freed, in order, with labels; kept as JSON lines."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from sys import intern
from typing import Any, Literal, NamedTuple, get_args

from peftplan.errors import InputError, UnknownNameError

Kind = Literal["alloc", "free", "empty_cache", "mark"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FORMAT = "peftplan-allocator-events"
VERSION = 1


class Event(NamedTuple):
    """One event. `id` names an allocation while it lives; `nbytes` is what was asked for, before rounding.

    Labels are opaque; every event carries its phase, frees too.
    """

    kind: Kind
    id: int = 0
    nbytes: int = 0
    stream: int = 0
    phase: str = ""
    op: str = ""
    module: str = ""


_INTEGERS, _LABELS = ("id", "nbytes", "stream"), ("phase", "op", "module")


def save_events(events: Iterable[Event], path: Path | str) -> None:
    """Write a header line and one line per event, defaults left out; the file appears whole or not at all."""
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps({"format": FORMAT, "version": VERSION}) + "\n")
            for event in events:
                fields = {key: value for key, value in event._asdict().items() if value or key == "kind"}
                file.write(json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n")
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def load_events(path: Path | str) -> list[Event]:
    """Read what `save_events` wrote; anything else is refused with its line number."""
    try:
        with open(path, encoding="utf-8") as file:
            header = _parse(file.readline(), 1)
            if header != {"format": FORMAT, "version": VERSION}:
                raise InputError("event log, line 1", header, f"accepted: format {FORMAT}, version {VERSION}")
            return [_event(_parse(line, number), number) for number, line in enumerate(file, start=2)]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("event log", str(path), f"it cannot be read: {error}") from error


def _parse(line: str, number: int) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"event log, line {number}", line, "accepted: one JSON object per line") from error
    if not isinstance(fields, dict):
        raise InputError(f"event log, line {number}", line, "accepted: one JSON object per line")
    return fields


def _event(fields: dict[str, Any], number: int) -> Event:
    where = f"event log, line {number}"
    for key, value in fields.items():
        if key in _INTEGERS:
            if type(value) is not int or (key == "nbytes" and value < 0):
                raise InputError(f"{where}, {key}", value, "accepted: a whole number")
        elif key in _LABELS:
            if type(value) is not str:
                raise InputError(f"{where}, {key}", value, "accepted: text")
            fields[key] = intern(value)
        elif key != "kind":
            raise UnknownNameError(f"{where}, key", key, Event._fields)
    if fields.get("kind") not in KINDS:
        raise UnknownNameError(f"{where}, kind", fields.get("kind"), KINDS)
    return Event(**fields)
