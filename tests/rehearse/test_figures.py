"""What a log still tells of a process that a signal ended."""

from __future__ import annotations

import json
from pathlib import Path

from peftplan.rehearse.figures import read_log

TRIAL = {"figures": [[1, "forward", 0, 900, 1000]], "facts": {"steps_taken": 0}}
"""A forward before there was an optimizer, such as a library's trial: (step, phase, device, allocated, reserved)."""
STEP = [
    {"figures": [[1, "forward", 0, 300, 1200]]},
    {"figures": [[1, "backward", 0, 400, 1200]]},
    {"figures": [[1, "backward", 0, 500, 1200]]},  # the same phase a moment later
    {"figures": [[1, "step", 0, 200, 1200]], "facts": {"steps_taken": 1}},
]


def log(folder: Path, *changes: object, cut: str = "") -> Path:
    path = folder / "log.1.jsonl"
    path.write_text("".join(f"{json.dumps(change)}\n" for change in changes) + cut, encoding="utf-8")
    return path


def test_what_ran_before_the_optimizer_was_loading(tmp_path: Path) -> None:
    report = read_log(log(tmp_path, TRIAL, {"loading": True}, *STEP))
    assert report is not None
    (device,) = report["devices"]
    assert report["steps_taken"] == 1
    assert device["peak_by_phase"] == {"load": 900, "forward": 300, "backward": 500, "step": 200}
    assert (device["peak_allocated"], device["peak_reserved"]) == (900, 1200)
    assert [step["step"] for step in device["steps"]] == [1]


def test_a_line_that_was_being_written_is_left_out(tmp_path: Path) -> None:
    report = read_log(log(tmp_path, *STEP, cut='{"figures": [[2, "forward", 0, 7'))
    assert report is not None
    assert report["devices"][0]["peak_by_phase"] == {"forward": 300, "backward": 500, "step": 200}


def test_a_process_that_used_no_device_has_no_report(tmp_path: Path) -> None:
    assert read_log(log(tmp_path)) is None
