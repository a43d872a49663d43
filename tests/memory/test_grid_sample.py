"""A sample of the drift grid, drawn with a seed from small models: no phase far off, and the middle close.

The whole grid is `tools/analytic_grid.py`, whose cells these are. A cell that fails is named with the call that repeats it.
"""

from __future__ import annotations

import random
from functools import cache
from statistics import median
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tools import analytic_grid as grid

SMALL = ("bert", "roberta", "distilbert", "deberta-v2", "vit", "gpt2", "opt", "llama", "gemma3_text", "bart", "t5", "whisper")
SEED, CELLS = 5, 20
WORST, MEDIAN = 0.01, 0.001


@cache
def sample() -> tuple[Any, ...]:
    """Cells of the grid with the bytes that both engines give them, or why there are none."""
    cells = list(grid.cells(model_types=SMALL))
    return tuple(map(grid.outcome, random.Random(SEED).sample(cells, CELLS)))


def test_both_engines_have_a_number_or_refuse_for_the_same_reason() -> None:
    for outcome in sample():
        ours, theirs = (grid.reason(each) for each in (outcome.analytic, outcome.traced))
        assert ours == theirs, f"analytic: {ours}; trace: {theirs}; repeat: {outcome.cell.command}"


def test_no_phase_is_far_from_the_trace() -> None:
    for outcome in sample():
        for phase in grid.PHASES:
            drift = outcome.drift(phase) or 0
            assert abs(drift) <= WORST, f"{phase} drifts by {drift:+.2%}; repeat: {outcome.cell.command}"


@pytest.mark.parametrize("phase", grid.PHASES)
def test_the_middle_of_the_drifts_is_close(phase: str) -> None:
    assert median(abs(drift) for outcome in sample() if (drift := outcome.drift(phase)) is not None) <= MEDIAN
