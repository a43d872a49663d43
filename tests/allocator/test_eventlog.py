"""Event logs as files: they come back, they replay to the same bytes, and what they are not is refused by its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftplan.allocator import eventlog
from peftplan.allocator.events import Event
from peftplan.allocator.replay import replay
from peftplan.errors import InputError, UnknownNameError
from peftplan.units import MIB

STEP = (
    Event("alloc", 0, 12 * MIB, phase="load", op="load", category="weights", name="embed.weight"),
    Event("alloc", 1, 3 * MIB - 1, phase="forward", op="aten.mm.default", module="model.layers.0", category="activations"),
    Event("free", 1, phase="backward", module="model.layers.0"),
    Event("mark", op="end", phase="step"),
    Event("empty_cache", phase="step"),
)


def test_a_log_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    eventlog.save(STEP, path, title="tiny · lora")
    assert eventlog.load(path) == ("tiny · lora", STEP)
    document = json.loads(path.read_text(encoding="utf-8"))  # the witness: a plain reader of JSON
    assert (document["format"], document["schema_version"]) == ("peftplan-events", 1)
    assert document["events"][1] == {
        "kind": "alloc",
        "id": 1,
        "bytes": 3145727,  # 3 MiB less one
        "phase": "forward",
        "op": "aten.mm.default",
        "module": "model.layers.0",
        "category": "activations",
    }
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(STEP) + 2, "one event per line"


def test_an_empty_log_comes_back(tmp_path: Path) -> None:
    eventlog.save((), tmp_path / "log.json")
    assert eventlog.load(tmp_path / "log.json") == ("", ())


TEXT = st.text(max_size=8)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 2**45), TEXT, TEXT, TEXT, TEXT, TEXT), max_size=6), TEXT)
def test_any_log_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], title: str) -> None:
    path = tmp_path_factory.mktemp("log") / "log.json"
    events = tuple(Event("alloc", number, size, 0, *labels) for number, (size, *labels) in enumerate(rows))
    eventlog.save(events, path, title=title)
    assert eventlog.load(path) == (title, events)


def test_what_comes_back_replays_to_the_same_bytes(tmp_path: Path) -> None:
    eventlog.save(STEP, tmp_path / "log.json")
    result = replay(eventlog.load(tmp_path / "log.json").events)
    # 12 MiB in a segment of its own, and 3 MiB in one of 20, which empty_cache gives back
    assert (result.peaks.allocated, result.peaks.reserved, result.reserved) == (15 * MIB, 32 * MIB, 12 * MIB)


def test_a_log_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    eventlog.save(STEP[:1], path)

    def broken() -> Iterator[Event]:
        yield STEP[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        eventlog.save(broken(), path)
    assert eventlog.load(path).events == STEP[:1]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="cannot write"):
        eventlog.save(STEP, tmp_path / "nowhere" / "log.json")


ALLOC = '{"kind": "alloc", "id": 0, "bytes": 1}'


@pytest.mark.parametrize(
    ("events", "error", "message"),
    [
        (f"{ALLOC}, x", InputError, "line 2, column"),
        (f"{ALLOC}, []", InputError, r"events\[1\]"),
        ('{"kind": "alloc", "nbytes": 1}', UnknownNameError, r"events\[0\], key: 'nbytes'.*did you mean bytes"),
        ('{"kind": "malloc"}', UnknownNameError, r"events\[0\]\.kind: 'malloc'.*did you mean alloc"),
        ('{"id": 1}', UnknownNameError, r"events\[0\]\.kind"),
        ('{"kind": "alloc", "bytes": -1}', InputError, r"events\[0\]\.bytes: -1"),
        ('{"kind": "alloc", "bytes": 70368744177664}', InputError, r"events\[0\]\.bytes"),
        ('{"kind": "alloc", "bytes": true}', InputError, r"events\[0\]\.bytes: True"),
        ('{"kind": "alloc", "bytes": 1.5}', InputError, r"events\[0\]\.bytes: 1.5"),
        ('{"kind": "alloc", "phase": 1}', InputError, r"events\[0\]\.phase: 1"),
        (f"{ALLOC}, {ALLOC}", InputError, r"events\[1\]\.id: 0 .* already allocated"),
        (f'{ALLOC}, {{"kind": "free", "id": 7}}', InputError, r"events\[1\]\.id: 7 .* no live allocation"),
    ],
)
def test_a_damaged_log_is_refused_by_its_place(tmp_path: Path, events: str, error: type[InputError], message: str) -> None:
    path = tmp_path / "log.json"
    path.write_text(f'{{"format": "peftplan-events", "schema_version": 1, "title": "", "events": [\n{events}\n]}}')
    with pytest.raises(error, match=message) as raised:
        eventlog.load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1"),
        ("[]", "not an event log of format peftplan-events, schema_version 1"),
        ('{"format": "peftplan-events", "schema_version": 2, "events": []}', "schema_version 1"),
        ('{"format": "peftplan-events", "schema_version": 1, "events": {}}', "its events a list"),
        ('{"format": "peftplan-events", "schema_version": 1, "event": []}', "did you mean events"),
        ("[" * 100_000, "not a JSON document"),
        ('{"format": ' + "9" * 5000 + "}", "not a JSON document"),
        ("\udcff", "not a JSON document"),
    ],
    ids=["empty", "list", "version", "events", "key", "deep", "long number", "bytes"],
)
def test_other_files_are_no_logs(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "log.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        eventlog.load(path)
    with pytest.raises(InputError, match="cannot read"):
        eventlog.load(tmp_path / "absent")
