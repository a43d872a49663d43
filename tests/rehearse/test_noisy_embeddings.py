"""`neftune_noise_alpha` of Trainer and SFTTrainer: twenty rehearsed steps over rows of equal length, three of those under DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from tools.rehearsed_jobs import read

ROWS = read(Path(__file__).with_name("noisy_embeddings.jsonl"))


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: "-".join(str(row["options"].get(name, "one")) for name in ("trainer", "method", "strategy"))
)
def test_noise_takes_the_place_of_embeddings(row: dict[str, Any]) -> None:
    peaks = peftplan.estimate(row["model"], **row["options"]).peaks
    assert peaks is not None
    assert peaks.allocated == pytest.approx(row["allocated"], rel=1e-4)
    assert peaks.reserved == row["reserved"]


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_noise_beside_shards_has_no_formula(strategy: str) -> None:
    assert peftplan.estimate("qwen2.5-0.5b", method="lora", noisy_embeddings=True, strategy=strategy, gpus=2).peaks is None
