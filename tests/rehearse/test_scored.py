"""Formulas against trl's older online trainers, rehearsed with trl 1.10 and models of few layers whose configs the rows keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftplan import estimate
from tools.rehearsed_jobs import drifts, read

ROWS = read(Path(__file__).with_name("scored.jsonl"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["job"]))
def test_formulas_hold_what_trl_holds(row: dict[str, Any], tmp_path: Path) -> None:
    """A rehearsal counts completions into the step before; those of a second micro batch into backward. Qwen2's reference had a
    cache, of 2.6 MB, which the scripts turn off."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(row["reward_config"]), encoding="utf-8")
    drift = drifts({**row, "job": f"{row['job']} --reward-model {config}"}, "analytic")
    assert drift is not None
    assert "reserved" not in drift
    assert abs(drift["allocated"]) < 0.1


def test_only_what_was_rehearsed_has_a_peak() -> None:
    job: dict[str, Any] = {"reward_model": "pythia-160m", "dtype": "fp32"}
    for trainer in ("trl-nash-md", "trl-xpo", "trl-ppo"):
        assert estimate("pythia-160m", trainer=trainer, method="full", **job).peaks is not None
        for other in ({"method": "lora"}, {"dtype": "bf16"}, {"strategy": "zero2", "gpus": 2}):
            assert estimate("pythia-160m", trainer=trainer, **{"method": "full", **job, **other}).peaks is None
    for trainer in ("trl-nash-md", "trl-xpo"):
        assert estimate("pythia-160m", trainer=trainer, method="full", **job, gradient_checkpointing=False).peaks is None
