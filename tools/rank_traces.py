"""Trace one rank of the rehearsed jobs over several GPUs, and keep the bytes for the table of docs/rank-drift.md.

    python -m tools.rank_traces [NAME ...]         traces jobs that have no kept trace; again, those whose name has one of these

Kept traces lie in tests/distributed/rank_traces.jsonl; tests/trace/test_rank.py traces one job of each kind again. Then run
`python -m tools.rank_jobs` to write the table.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import patch

import peftplan
from peftplan.results.peaks import Peaks
from tools.rank_jobs import CARD, KEPT, PHASES, kept_traces, options, rows


def traced(row: dict[str, Any]) -> dict[str, Any] | None:
    """The peaks of a job by trace, on the rank that was rehearsed; None if no trace follows it."""
    rank = row.get("rank", 0)
    try:
        without_images = patch.dict("peftplan.trace.pictures.BESIDE_TEXT", clear=True)  # as the program's batches are
        with without_images, patch("peftplan.planning.question.traced_ranks", lambda *_: (rank,)):
            peaks = peftplan.estimate(**options(row), gpu=CARD, engine="trace").peaks
    except peftplan.RefusedError as error:
        print(row["name"], error, file=sys.stderr, flush=True)
        return None
    assert peaks is not None
    return bytes_of(peaks)


def bytes_of(peaks: Peaks) -> dict[str, Any]:
    """The bytes of a trace that are kept; of a `device_map` those of each GPU too."""
    by_phase = {phase: peaks.by_phase[phase] for phase in PHASES}
    of_devices = {"devices": [bytes_of(own) for own in peaks.devices]} if peaks.devices else {}
    return {"peak_by_phase": by_phase, "peak_reserved": peaks.reserved, **of_devices}


def run(names: list[str]) -> None:
    """Trace jobs and keep their bytes, in the order of the rows."""
    kept = kept_traces()
    for row in rows():
        name = row["name"]
        wanted = any(part in name for part in names) if names else name not in kept
        if wanted and (peaks := traced(row)) is not None:
            kept[name] = peaks
            lines = (json.dumps({"name": name, **kept[name]}) + "\n" for name in (r["name"] for r in rows()) if name in kept)
            KEPT.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    run(sys.argv[1:])
