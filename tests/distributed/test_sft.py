"""SFTTrainer over several GPUs, with the loss that it always makes: formulas against rehearsals (`tools/rehearsed_jobs.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools.rehearsed_jobs import drifts, read

ROWS = read(Path(__file__).parents[1] / "rehearse" / "sft_ranks.jsonl")
RESERVED = 0.4
"""Per cent: 4 MiB of QLoRA, whose model is quantized before it is sharded; 2 MiB under DDP; all others are equal."""


@pytest.mark.parametrize("row", ROWS, ids=[row["job"] for row in ROWS])
def test_formulas_hold_what_the_trainer_holds(row: dict[str, Any]) -> None:
    drift = drifts(row, "analytic")
    assert drift is not None
    assert max(abs(drift[what]) for what in ("allocated", "forward", "backward")) < 0.003
    assert abs(drift["step"]) < 0.13
    assert abs(drift["reserved"]) < (RESERVED if "qlora" in row["job"] or "ddp" in row["job"] else 0.001)
