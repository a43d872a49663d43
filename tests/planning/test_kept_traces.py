"""Kept traces of the comparing tools: what is in the file is not traced again, and a changed job is."""

from __future__ import annotations

from pathlib import Path

from tools.engines import KeptTraces

CONFIG, OPTIONS = {"model_type": "llama", "num_hidden_layers": 2}, {"method": "lora", "target_modules": ["q_proj"]}
TRACED = {"load": 1, "forward": 2, "backward": 4, "step": 3, "reserved": 5}


def test_what_was_kept_is_read_again(tmp_path: Path) -> None:
    KeptTraces(tmp_path / "traces").keep(CONFIG, OPTIONS, TRACED)
    again = KeptTraces(tmp_path / "traces")
    assert again.get(CONFIG, dict(reversed(OPTIONS.items()))) == TRACED
    assert again.get(CONFIG | {"num_hidden_layers": 3}, OPTIONS) is None
    assert again.get(CONFIG, OPTIONS | {"method": "dora"}) is None


def test_a_job_has_one_line(tmp_path: Path) -> None:
    traces = KeptTraces(tmp_path / "traces")
    for _ in range(2):
        traces.keep(CONFIG, OPTIONS, TRACED)
    traces.keep(CONFIG, OPTIONS | {"method": "dora"}, "refused: no")
    assert len((tmp_path / "traces").read_text().splitlines()) == 2
