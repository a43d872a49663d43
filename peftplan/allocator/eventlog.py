"""A run's event log as a file: one JSON document, one event per line, that comes back as it was and can be replayed.

{"format": "peftplan-events", "schema_version": 1, "title": "…", "events": [
{"kind": "alloc", "id": 0, "bytes": 1024, "phase": "load", "op": "…", "module": "…", "category": "weights", "name": "…"},
{"kind": "free", "id": 0, "phase": "step"}
]}

`bytes` is what was asked for, before the allocator rounds; fields at their default (0, "") are left out. Reading is strict: a
key, a kind or a type that is not in this format is refused by its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from sys import intern
from typing import NamedTuple

from peftplan.allocator.device import ENDLESS
from peftplan.allocator.events import KINDS, Event
from peftplan.errors import InputError, UnknownNameError
from peftplan.files import content, replacing

FORMAT = "peftplan-events"
SCHEMA_VERSION = 1

HEADER = ("format", "schema_version", "title", "events")
INTEGERS = {"id": "id", "bytes": "nbytes", "stream": "stream"}
"""Key in the file → field of `Event`."""
LABELS = ("phase", "op", "module", "category", "name")
KEYS = ("kind", *INTEGERS, *LABELS)


class EventLog(NamedTuple):
    """What was run, in words, and every allocation and free of it."""

    title: str
    events: tuple[Event, ...]


def save(events: Iterable[Event], path: Path | str, *, title: str = "") -> None:
    """Write the log; the file appears whole or not at all. Raises InputError where it cannot be written."""
    header = json.dumps({"format": FORMAT, "schema_version": SCHEMA_VERSION, "title": title})
    with replacing(path, field="timeline") as file:
        file.write(f'{header[:-1]}, "events": ['.encode())
        for number, event in enumerate(events):
            file.write((",\n" if number else "\n").encode() + _text(event).encode())
        file.write(b"\n]}\n")


def load(path: Path | str) -> EventLog:
    """Read what `save` wrote. Raises InputError or UnknownNameError, which name the line or the field, for anything else."""
    try:
        document = json.loads(content(path, field="file"))
    except json.JSONDecodeError as error:
        raise InputError(
            "file", str(path), f"not an event log: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError("file", str(path), "not an event log: not a JSON document") from error
    if not isinstance(document, dict) or (document.get("format"), document.get("schema_version")) != (FORMAT, SCHEMA_VERSION):
        raise InputError("file", str(path), f"not an event log of format {FORMAT}, schema_version {SCHEMA_VERSION}")
    for key in document:
        if key not in HEADER:
            raise UnknownNameError("file: key", key, HEADER)
    title, events = document.get("title", ""), document.get("events")
    if type(title) is not str or type(events) is not list:
        raise InputError("file", str(path), "not an event log: its title must be a string and its events a list")
    return EventLog(title, _checked(events))


def _text(event: Event) -> str:
    fields: dict[str, object] = {"kind": event.kind}
    fields |= {key: value for key, field in INTEGERS.items() if (value := getattr(event, field)) or key == "id"}
    fields |= {key: value for key in LABELS if (value := getattr(event, key))}
    return json.dumps(fields)


def _checked(events: list[object]) -> tuple[Event, ...]:
    """The events, each well formed, and no allocation twice or freed while it does not live."""
    live: set[int] = set()
    read = []
    for number, fields in enumerate(events):
        event = _event(fields, where=f"events[{number}]")
        if event.kind == "alloc" and event.id in live:
            raise InputError(f"events[{number}].id", event.id, "already allocated")
        if event.kind == "free" and event.id not in live:
            raise InputError(f"events[{number}].id", event.id, "no live allocation has this id")
        if event.kind in ("alloc", "free"):
            live ^= {event.id}
        read.append(event)
    return tuple(read)


def _event(fields: object, *, where: str) -> Event:
    if type(fields) is not dict:
        raise InputError(where, fields, "accepted: an object")
    if type(fields.get("kind")) is not str or fields["kind"] not in KINDS:
        raise UnknownNameError(f"{where}.kind", fields.get("kind"), KINDS)
    values: dict[str, object] = {"kind": fields["kind"]}
    for key, value in fields.items():
        if key in INTEGERS:
            if type(value) is not int or not 0 <= value < ENDLESS:
                raise InputError(f"{where}.{key}", value, "accepted: a whole number from 0 to 2^46")
            values[INTEGERS[key]] = value
        elif key in LABELS:
            if type(value) is not str:
                raise InputError(f"{where}.{key}", value, "accepted: a string")
            values[key] = intern(value)
        elif key != "kind":
            raise UnknownNameError(f"{where}, key", key, KEYS)
    make: Callable[..., Event] = Event
    return make(**values)
