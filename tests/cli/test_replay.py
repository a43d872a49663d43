"""`peftplan replay`: an event log and a snapshot of torch in every format, where memory runs out, and files from elsewhere."""

from __future__ import annotations

import csv
import io
import json
import pickle
import random
import re
from pathlib import Path
from typing import Any

import pytest

from peftplan.allocator import eventlog
from peftplan.allocator.events import Event
from peftplan.errors import PeftplanError
from peftplan.planning.replayed import replay_file
from peftplan.units import MIB
from tests.cli.run import run

EVENTS = (
    Event("alloc", 0, 100 * MIB, phase="load", op="load", category="weights", name="embed.weight"),
    Event("alloc", 1, 30 * MIB - 100, phase="forward", op="aten.mm.default", module="layers.0", category="activations"),
    Event("alloc", 2, 30 * MIB, phase="forward", op="aten.mm.default", module="layers.1", category="activations"),
    Event("free", 1, phase="backward"),
    Event("free", 2, phase="backward"),
    Event("alloc", 3, 50 * MIB, phase="backward", op="aten.add.Tensor", module="layers.1", category="temporaries"),
)
# Every allocation has a segment of its own: 100, 130, 160 reserved; the 50 fit in none of the two free 30, so 210.


@pytest.fixture
def log(tmp_path: Path) -> str:
    eventlog.save(EVENTS, tmp_path / "log.json", title="tiny · lora")
    return str(tmp_path / "log.json")


def snapshot() -> dict[str, Any]:
    """What torch would have recorded of 12 MiB, still alive, of which 1 MiB more was there before."""
    base = {"stream": 0, "time_us": 1, "frames": [{"filename": "m.py", "line": 1, "name": "forward\x1b[31m"}]}
    trace = [
        {"action": "segment_alloc", "addr": 1 << 30, "size": 12 * MIB, **base},
        {"action": "alloc", "addr": 1 << 30, "size": 12 * MIB, **base},
        {"action": "free_completed", "addr": 1 << 20, "size": MIB, **base},
    ]
    blocks = [{"address": 1 << 30, "size": 12 * MIB, "requested_size": 12 * MIB, "state": "active_allocated"}]
    segments = [{"device": 0, "address": 1 << 30, "total_size": 12 * MIB, "stream": 0, "blocks": blocks}]
    return {"segments": segments, "device_traces": [trace], "allocator_settings": {}}


@pytest.fixture
def recorded(tmp_path: Path) -> str:
    (tmp_path / "s.pickle").write_bytes(pickle.dumps(snapshot()))
    return str(tmp_path / "s.pickle")


def test_peaks_by_phase(log: str) -> None:
    shown = run("replay", log).out
    assert shown.startswith("event log · tiny · lora · events: 6\n")
    rows = {line.split()[0]: line.split()[-5:-2] for line in shown.splitlines() if re.match(r"load|forward|backward|whole", line)}
    # 30 MiB less 100 bytes are rounded up to 30 MiB
    assert rows["load"] == ["104,857,600"] * 3
    assert rows["forward"] == ["167,772,160", "167,772,060", "167,772,160"]
    assert rows["backward"] == ["167,772,160", "167,772,060", "220,200,960"]
    assert rows["whole"] == rows["backward"]
    assert "0 B reserved and free (fragmentation), 100 B lost to rounding" in " ".join(shown.split())
    assert "out of memory" not in shown


def test_where_memory_runs_out(log: str) -> None:
    # 139 MiB hold 100 + 30, and 9 are left for the second 30: 21 are missing.
    done = run("replay", log, "--capacity", "139MiB", columns=200)
    assert done.code == 0, "not fitting is an answer"
    assert (
        "out of memory in forward, at event 2: aten.mm.default in layers.1 requested 31,457,280 bytes (activations)" in done.out
    )
    assert "missing: 21.00 MiB; 130.00 MiB allocated, 130.00 MiB reserved, 0 B free in pieces of at most 0 B" in done.out
    assert "too little even as one piece" in done.out
    assert run("replay", log, "--capacity", "139MiB", "--require-fit").code == 1
    assert run("replay", log, "--capacity", "160MiB", "--require-fit").code == 0


def test_what_is_lost_to_fragmentation_is_said(log: str, tmp_path: Path) -> None:
    # Halves of a segment of 20 MiB stay alive in turn, so that 4 free pieces of 5 MiB in 2 segments hold no 12 MiB.
    pieces = [Event("alloc", n, 5 * MIB, phase="forward") for n in range(8)]
    holes = [Event("free", n, phase="forward") for n in (0, 2, 4, 6)]
    eventlog.save([*pieces, *holes, Event("alloc", 9, 12 * MIB, phase="forward", op="big")], tmp_path / "holes.json")
    document = json.loads(run("replay", str(tmp_path / "holes.json"), "--capacity", "50MiB", "--format", "json").out)
    oom = document["out_of_memory"]
    assert (oom["op"], oom["requested"], oom["fragmented"], oom["largest_free"]) == ("big", 12 * MIB, 20 * MIB, 5 * MIB)
    # 40 reserved and 12 more exceed 50 by 2
    assert (oom["missing"], oom["lost_to_fragmentation"]) == (2 * MIB, True)
    fits = run("replay", str(tmp_path / "holes.json"), "--capacity", "60MiB")
    assert "fits in 60.00 MiB" in fits.out


def test_options_of_the_allocator_are_taken(log: str) -> None:
    # Expandable segments map pages of 20 MiB: 100, 140 for 130, 160; the two free 30 merge and take the 50.
    document = json.loads(run("replay", log, "--alloc-conf", "expandable_segments:True", "--format", "json").out)
    assert document["peaks"][-1] == {
        "phase": "whole run",
        "allocated": 160 * MIB,
        "requested": 160 * MIB - 100,
        "reserved": 160 * MIB,
    }


def test_an_older_torch_fills_other_holes(tmp_path: Path) -> None:
    """Two free 20, one in the first segment of 40, one the second segment: whoever takes the latter leaves a whole 40 free."""
    sizes = [(0, 40), (1, 20), (0, 0), (2, 20), (1, 0), (3, 20), (2, 0), (4, 40)]
    events = [Event("alloc" if size else "free", id, size * MIB, phase="step") for id, size in sizes]
    eventlog.save(events, tmp_path / "holes.json", title="")
    for torch, reserved in (([], 100), (["--torch", "2.13"], 100), (["--torch", "2.12.1"], 60)):
        document = json.loads(run("replay", str(tmp_path / "holes.json"), *torch, "--format", "json").out)
        assert document["peaks"][-1]["reserved"] == reserved * MIB


def test_every_format_says_the_same(log: str) -> None:
    document = json.loads(run("replay", log, "--format", "json").out)
    assert (document["schema_version"], document["source"], document["events"], document["capacity"]) == (1, "event log", 6, None)
    rows = list(csv.DictReader(io.StringIO(run("replay", log, "--format", "csv").out)))
    assert rows == [{key: str(value) for key, value in peaks.items()} for peaks in document["peaks"]]
    markdown = run("replay", log, "--format", "markdown").out
    assert "| whole run | 167,772,160 | 167,772,060 | 220,200,960 | 210.00 MiB |" in markdown


def test_a_snapshot_is_replayed_beside_its_record(recorded: str) -> None:
    done = run("replay", recorded, columns=120)
    assert done.out.startswith("torch snapshot · events: 1\n"), "the free of what was never seen is no event"
    assert "recorded: 12,582,912 bytes reserved at the peak, the replay +0" in done.out
    assert "incomplete: blocks that were allocated before the recording began: 1" in done.out
    short = run("replay", recorded, "--capacity", "8MiB", columns=120).out
    assert "\x1b" not in short, "a name from elsewhere writes no escape codes"
    assert "forward?[31m requested 12,582,912 bytes" in short


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("./nothing.json", ["FILE: cannot read './nothing.json'", "No such file"]),
        ("./golden", ["FILE", "directory"]),
        ("./tiny.json", ["FILE: './tiny.json'", "peftplan-events"]),
        ("./run.py", ["FILE", "event log", "line 1"]),
        ("LOG --alloc-conf max_split:1", ["--alloc-conf: ", "did you mean max_split_size_mb"]),
        ("LOG --alloc-conf expandable_segments:yes", ["expandable_segments", "True, False"]),
        ("LOG --alloc-conf per_process_memory_fraction:0.5", ["device_bytes", "per_process_memory_fraction"]),
        ("LOG --torch main", ["--torch: 'main'", "a version such as 2.10"]),
        ("LOG --capacity 0GiB", ["--capacity: '0GiB'", "above zero"]),
        ("LOG --format xml", ["format", "'xml'"]),
        ("SNAPSHOT --device 3", ["--device: 3", "1 devices"]),
        ("", ["FILE"]),
    ],
)
def test_bad_input_is_one_line(args: str, expected: list[str], log: str, recorded: str) -> None:
    words = [{"LOG": log, "SNAPSHOT": recorded}.get(word, word) for word in args.split()]
    done = run("replay", *words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert [text for text in expected if text not in done.err] == []


def test_a_memory_fraction_is_of_the_whole_device(log: str) -> None:
    half = ("--alloc-conf", "per_process_memory_fraction:0.5", "--device-memory")
    # 160 MiB are needed: for the 50 the two free 30 are given back.
    assert "out of memory in forward" in run("replay", log, *half, "318MiB").out
    assert "out of memory" not in run("replay", log, *half, "320MiB").out


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "made"
    argument = str(target).encode()
    by_opcode = (
        b"\x80\x04cos\nmkdir\n(V" + argument + b"\ntR.",  # GLOBAL, REDUCE
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c" + bytes([len(argument)]) + argument + b"\x85R.",  # STACK_GLOBAL
        b"\x80\x02(X" + len(argument).to_bytes(4, "little") + argument + b"ios\nmkdir\n.",  # INST
    )
    for number, attack in enumerate(by_opcode):
        path = tmp_path / f"{number}.pickle"
        path.write_bytes(attack)
        done = run("replay", str(path))
        assert (done.code, done.out) == (2, "")
        assert "the snapshot names 'os.mkdir': only plain containers" in done.err
        assert not target.exists()
        pickle.loads(attack)  # the witness: it would have
        assert target.exists()
        target.rmdir()


def test_damaged_snapshots_are_refused_in_one_line(tmp_path: Path) -> None:
    whole, path, dice = pickle.dumps(snapshot()), tmp_path / "s.pickle", random.Random(0)
    messages = []
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(2, len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged[: dice.choice((len(damaged), dice.randrange(2, len(damaged))))])
        try:
            replay_file(path)
        except PeftplanError as error:
            messages.append(str(error))
    assert len(messages) > 300
    assert [text for text in messages if "\n" in text] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("size", "abc"), ("size", -1), ("size", float("inf")), ("size", 1 << 60), ("addr", []), ("stream", None), ("action", 7)],
)
def test_fields_of_another_kind_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    damaged = snapshot()
    damaged["device_traces"][0][1][key] = value
    (tmp_path / "s.pickle").write_bytes(pickle.dumps(damaged))
    done = run("replay", str(tmp_path / "s.pickle"))
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
