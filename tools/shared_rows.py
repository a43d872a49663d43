"""Rehearse ranks of Trainer that share each row of tokens, as torch's `context_parallel` divides it under FSDP2.

    python -m tools.shared_rows FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: the `world`, the `rank` that is played, and what tests/distributed/programs/trainer.py is told
(`program`), with `cp_size` in `parallel`. Needs the CUDA build of torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peftplan.rehearse import rehearse
from tools import rank_jobs
from tools.rehearsed_recipes import complete, kept_of

CARD = "a100-80gb"
OF_ALL: dict[str, Any] = {"strategy": "fsdp2", "fsdp": {}}
FSDP = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}


def options(row: dict[str, Any]) -> dict[str, Any]:
    """The job as `peftplan.estimate` takes it."""
    return rank_jobs.options(OF_ALL | row)


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the rank held."""
    command = rank_jobs.command(OF_ALL | row | {"program": row["program"] | {"arguments": FSDP}})
    card = f"{row['world']}x{CARD}"
    return row | kept_of(rehearse(command, world_size=row["world"], rank=row["rank"], gpu=card, steps=3, timeout=3000))


if __name__ == "__main__":
    complete(Path(sys.argv[1]), run)
