"""Formulas against random jobs that were rehearsed as programs of transformers, TRL or torch alone."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tools.rehearsed_jobs import compared, drawn, page, read

ROOT = Path(__file__).parents[2]
ROWS = read(Path(__file__).with_name("jobs.jsonl"))
LARGEST = {"allocated": 1.1, "reserved": 3.6}
"""Per cent: gemma-3-270m's accumulated step under TRL, and its QDoRA, whose loading holds 5 % more than both engines say."""
OPEN = ("gemma-3-270m --trainer plain --method qlora --batch-size 3 --seq-len 128 --r 4",)
"""Reserved bytes -11.5 %: for up to 1,536 tokens bitsandbytes multiplies by a small weight without dequantizing it
(`backends/cuda/ops.py`, `_gemm_4bit_use_custom_cuda`), which neither engine counts. Without these blocks a product of 3 MiB
is cut from a block of logits, and the next logits take a new one. With that kernel off, the program allocates to the byte
what the trace says, and reserves 2 MiB more.
"""


@pytest.fixture(scope="module")
def results() -> list[tuple[str, dict[str, object], dict[str, float] | None]]:
    return list(compared(ROWS, ("analytic",)))


@pytest.mark.parametrize("what", LARGEST)
def test_formulas_hold_what_real_trainers_hold(what: str, results: list[tuple[str, dict[str, object], dict[str, float]]]) -> None:
    drifts = {row["job"]: abs(drift[what]) for _, row, drift in results if drift is not None}
    assert len(drifts) >= 0.9 * len(ROWS) >= 54
    assert statistics.median(drifts.values()) <= 0.05
    assert max(drift for job, drift in drifts.items() if job not in OPEN) <= LARGEST[what]


def test_the_page_shows_the_rows(results: list[tuple[str, dict[str, object], dict[str, float] | None]]) -> None:
    assert page(results) == (ROOT / "docs" / "rehearsal-drift.md").read_text(encoding="utf-8")


def test_a_job_is_drawn_from_its_seed_and_number() -> None:
    assert drawn(1, 5) == drawn(1, 5) != drawn(1, 6)
