"""Rehearse, and where a trace plays any rank, trace further ranks of the jobs of tools/rank_grid.py: ranks that need less.

    python -m tools.each_rank 'NAME@RANK' ...      needs the CUDA build of torch, the traces DeepSpeed

Rows lie in tests/distributed/each_rank.jsonl; tests/distributed/test_each_rank.py compares them with the groups of ranks.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.rank_grid import job, jobs
from tools.rank_jobs import CARD, LIBRARIES, ROOT, command
from tools.rank_traces import traced

ROWS = ROOT / "tests" / "distributed" / "each_rank.jsonl"
SHARES_HEAD = job("zero1", "full", 16, model="pythia-1b", layers=16, seq_len=256, zero={"overlap_comm": True})
"""Rank 14 keeps as many gradients as rank 1, and keeps them from the head's on, with which backward begins."""
RESERVES_MORE = job("zero1", "full", 16, model="llama-3.2-1b", layers=16, seq_len=1024, batch_size=4)
"""Rank 13 allocates as much as rank 0, and reserves a fifth more."""
BETWEEN = (
    job("zero2", "full", 8, model="llama-3.2-1b", layers=16, seq_len=128, accumulation=2),
    job(
        "zero2", "full", 6, model="qwen2.5-0.5b", layers=24, seq_len=64, accumulation=2, zero={"reduce_bucket_size": 200_000_000}
    ),
)
"""Ranks 6 and 2 allocate most: they keep more gradients than the last ranks, and keep them earlier than the first ones."""
ANY_RANK = ("zero1", "zero2")
"""Strategies of which a trace plays any rank."""


def rows(path: Path = ROWS) -> list[dict[str, Any]]:
    """What was rehearsed."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(name: str, rank: int) -> None:
    """Rehearse a rank of a job, trace it where that is possible, and append the row."""
    from peftplan.rehearse import rehearse

    of_grid = next(each for each in (*jobs(), SHARES_HEAD, RESERVES_MORE, *BETWEEN) if each["name"] == name)
    result = rehearse(
        command(of_grid),
        gpu=f"{of_grid['world']}x{CARD}",
        world_size=of_grid["world"],
        rank=rank,
        steps=3,
        timeout=600,
        stdout=os.open(os.devnull, os.O_WRONLY),
    )
    rehearsed = result.largest_rank
    assert rehearsed is not None, result.ended
    assert result.ended == "steps", result.ended
    row = {**of_grid, "rank": rank, "peak_by_phase": rehearsed.peak_by_phase, "peak_reserved": rehearsed.peak_reserved}
    if of_grid["strategy"] in ANY_RANK:
        row["traced"] = traced(row)
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "versions": {name: version(name) for name in LIBRARIES}}) + "\n")


if __name__ == "__main__":
    for words in sys.argv[1:]:
        job_name, _, number = words.rpartition("@")
        run(job_name, int(number))
