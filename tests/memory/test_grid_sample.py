"""A sample of the drift grid, drawn with a seed from small models: no phase far off, and the middle close.

The whole grid is `tools/analytic_grid.py`, whose cells these are. A cell that fails is named with the call that repeats it. Tails
of blocks that the allocator hands out whole are left out: beside models this small they are a share of their own.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest

from peftplan import estimate
from peftplan.errors import PeftplanError

pytest.importorskip("transformers")
pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("bert", "roberta", "distilbert", "deberta-v2", "vit", "gpt2", "opt", "llama", "gemma3_text", "bart", "t5", "whisper")
SEED, CELLS = 5, 12
WORST, MEDIAN = 0.04, 0.01
TAILS = "tails of unsplit blocks"


def _grid() -> Any:
    spec = importlib.util.spec_from_file_location("analytic_grid", ROOT / "tools" / "analytic_grid.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


GRID = _grid()


class Scored(NamedTuple):
    """Analytic ÷ traced − 1 of each phase of a cell."""

    drifts: dict[str, float]
    command: str


def _bytes(cell: Any, engine: Any) -> dict[str, int] | None:
    try:
        found = estimate(GRID.shallow(cell.model), engine=engine, **dict(cell.options)).peaks
    except PeftplanError:
        return None
    if found is None:
        return None
    return {phase: sum(line.bytes() for line in ledger if line.name != TAILS) for phase, ledger in found.ledgers.items()}


@cache
def sample() -> tuple[Scored, ...]:
    """The first cells of the shuffled grid that the analytic engine puts a number on."""
    cells = list(GRID.cells(model_types=SMALL))
    random.Random(SEED).shuffle(cells)
    found: list[Scored] = []
    for cell in cells:
        ours = _bytes(cell, "analytic")
        if ours is None:
            continue
        traced = _bytes(cell, "trace")
        assert traced is not None, f"the trace has no number for what has a formula; repeat: {cell.command}"
        found.append(Scored({phase: ours[phase] / traced[phase] - 1 for phase in GRID.PHASES}, cell.command))
        if len(found) == CELLS:
            break
    return tuple(found)


def test_no_phase_is_far_from_the_trace() -> None:
    for cell in sample():
        for phase, drift in cell.drifts.items():
            assert abs(drift) <= WORST, f"{phase} drifts by {drift:+.2%}; repeat: {cell.command}"


@pytest.mark.parametrize("phase", GRID.PHASES)
def test_the_middle_of_the_drifts_is_close(phase: str) -> None:
    middle = median(abs(cell.drifts[phase]) for cell in sample())
    farthest = max(sample(), key=lambda cell: abs(cell.drifts[phase]))
    assert middle <= MEDIAN, f"{phase}: median {middle:.2%}; farthest {farthest.drifts[phase]:+.2%}: {farthest.command}"
