"""ZeRO-1 and ZeRO-2: another rank may reserve more than the one with the highest peak. Rehearsals of such ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peftplan
from tools.rank_jobs import CARD, options, rows

RANKS = json.loads(Path(__file__).with_name("other_ranks.json").read_text(encoding="utf-8"))
JOBS = {row["name"]: row for row in rows()}


@pytest.mark.parametrize("rehearsed", RANKS, ids=[f"{row['name']} rank {row['rank']}" for row in RANKS])
def test_a_verdict_counts_the_rank_that_reserves_most(rehearsed: dict[str, Any]) -> None:
    """Reserved bytes of a verdict are those of the rehearsed rank, more than of the rank of `rank_jobs.jsonl`."""
    other = JOBS[rehearsed["name"]]
    result = peftplan.estimate(**options(other), gpu=CARD)
    peaks = result.peaks
    assert peaks is not None
    assert max(rehearsed["peak_by_phase"].values()) <= 1.001 * peaks.allocated
    assert peaks.reserved_at_most == pytest.approx(max(rehearsed["peak_reserved"], other["peak_reserved"]), rel=1e-3)
    assert result.gpus[0].needed_bytes >= peaks.reserved_at_most
