"""Rehearse LLaMA-Factory v1's `llamafactory-cli sft` and keep what it held, as `tools.rehearsed_llamafactory` does of v0.

    python -m tools.rehearsed_llamafactory_v1 FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: `values` of the config and how many `layers` of the model run. Rows are as long as `cutoff_len`
says. Needs llamafactory 0.9.5 and the CUDA build of torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_values
from peftplan.rehearse import rehearse
from peftplan.rehearse.inside import standins
from tools.rank_grid import cut
from tools.rehearsed_recipes import complete, kept_of

ROWS = 64
SHARED: dict[str, Any] = {"train_dataset": "rows", "max_steps": 4, "batching_workers": 0}
"""Values of every job."""
PROGRAM = "from llamafactory.v1.trainers.sft_trainer import run_sft; run_sft()"


def plan(row: dict[str, Any]) -> ConfigPlan:
    """What is read of the job's config."""
    return read_values(SHARED | row["values"], file="a.yaml", tool="llamafactory-v1")


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the tool held."""
    values = row["values"]
    with TemporaryDirectory() as folder, TemporaryDirectory() as output:
        standins.write_repository(Path(folder), {**cut(values["model"], row["layers"]), "dtype": "bfloat16"})
        turns = (("user", "ask"), ("assistant", "good" * values["cutoff_len"]))
        messages = [{"role": role, "content": [{"type": "text", "value": text}]} for role, text in turns]
        Path(output, "rows.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * ROWS, encoding="utf-8")
        data = Path(output, "data.yaml")
        data.write_text(yaml.safe_dump({"rows": {"path": f"{output}/rows.jsonl", "source": "local"}}), encoding="utf-8")
        places = {"model": folder, "train_dataset": str(data), "output_dir": f"{output}/out"}
        file = Path(output, "config.yaml")
        file.write_text(yaml.safe_dump(SHARED | values | places), encoding="utf-8")
        command = [sys.executable, "-c", PROGRAM, str(file)]
        return row | kept_of(rehearse(command, gpu="a100-80gb", timeout=900, stdout=sys.stderr.fileno()))


if __name__ == "__main__":
    complete(Path(sys.argv[1]), run)
