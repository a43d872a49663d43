"""`neftune_noise_alpha` of Trainer and SFTTrainer on one GPU: twenty rehearsed steps over rows of equal length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from tools.rehearsed_jobs import read

ROWS = read(Path(__file__).with_name("noisy_embeddings.jsonl"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['options']['trainer']}-{row['options']['method']}")
def test_noise_takes_the_place_of_embeddings(row: dict[str, Any]) -> None:
    peaks = peftplan.estimate(row["model"], **row["options"]).peaks
    assert peaks is not None
    assert peaks.allocated == pytest.approx(row["allocated"], rel=1e-4)
    assert peaks.reserved == row["reserved"]


def test_noise_on_several_gpus_has_no_formula() -> None:
    assert peftplan.estimate("qwen2.5-0.5b", method="lora", noisy_embeddings=True, strategy="ddp", gpus=2).peaks is None
