"""Formulas against SFTTrainer of trl 0.11.4 with transformers 4.44.2 and peft 0.12, rehearsed with torch 2.13."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.errors import RefusedError
from tools.rehearsed_jobs import read

ROWS = read(Path(__file__).with_name("earlier_trl.jsonl"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}-{row['options']['seq_len']}")
def test_tables_go_back_to_16_bits(row: dict[str, Any]) -> None:
    result = peftplan.estimate(row["model"], script=peftplan.Script(transformers=row["transformers"]), **row["options"])
    assert result.peaks is not None
    near = 0.006 if row["model"].startswith("tinyllama") else 0.0003  # tails of its blocks
    assert result.peaks.allocated == pytest.approx(row["allocated"], rel=near)
    assert (result.peaks.reserved is None) is bool(row["options"].get("narrow_tables"))
    assert result.peaks.by_phase == {phase: pytest.approx(nbytes, rel=0.01) for phase, nbytes in row["by_phase"].items()}


def test_tables_go_back_over_4_bits_under_bf16_alone() -> None:
    with pytest.raises(RefusedError, match="narrow_tables"):
        peftplan.estimate("qwen2.5-0.5b", method="lora", narrow_tables=True)
    on_ranks = peftplan.estimate("qwen2.5-0.5b", method="qlora", narrow_tables=True, strategy="ddp", gpus=2)
    assert on_ranks.peaks is None


def test_other_jobs_do_not_name_the_option() -> None:
    assert "narrow_tables" not in peftplan.estimate("qwen2.5-0.5b", method="qlora").assumptions
