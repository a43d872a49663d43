"""Methods and optimizers over several GPUs: formulas against kept traces (`python -m tools.traced_methods`) and rehearsals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools.rehearsed_jobs import drifts, read
from tools.traced_methods import kept, peaks

TRACED = kept()
REHEARSED = read(Path(__file__).parents[1] / "rehearse" / "optimizers.jsonl")


def called(row: dict[str, Any]) -> str:
    return " ".join(str(value) for name, value in row.items() if name != "traced")


@pytest.mark.parametrize("row", TRACED, ids=map(called, TRACED))
def test_a_traced_job(row: dict[str, Any]) -> None:
    estimated = peaks({name: value for name, value in row.items() if name != "traced"}, "analytic")
    assert estimated is not None
    for phase, traced in row["traced"]["by_phase"].items():
        assert estimated["by_phase"][phase] == pytest.approx(traced, rel=1e-3), phase
    assert estimated["reserved"] == pytest.approx(row["traced"]["reserved"], rel=1e-3)


@pytest.mark.parametrize("row", REHEARSED, ids=[row["job"] for row in REHEARSED])
def test_a_rehearsed_job(row: dict[str, Any]) -> None:
    """bitsandbytes' optimizers over DeepSpeed's flat partitions; LoRA's load with r 64 is not the peak."""
    drift = drifts(row, "analytic")
    assert drift is not None
    assert drift["reserved"] == 0
    assert max(abs(drift[what]) for what in ("allocated", "forward", "backward")) < 0.001
    assert abs(drift["step"]) < 0.11
