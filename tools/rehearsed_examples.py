"""Rehearse transformers' example `run_clm.py` and keep what it held, as `tools.rehearsed_llamafactory` does.

    EXAMPLE=.../run_clm.py python -m tools.rehearsed_examples FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: `values`, the arguments, and how many `layers` of the model run. Rows are as long as
`block_size` says. Needs the script, transformers of its release, and the CUDA build of torch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_values
from peftplan.rehearse import rehearse
from peftplan.rehearse.inside import standins
from tools.rank_grid import cut
from tools.rehearsed_recipes import complete, kept_of

ROWS = 64
SHARED: dict[str, Any] = {"do_train": True, "report_to": "none", "max_steps": 4, "save_strategy": "no"}
"""Arguments of every job."""
PROGRAM = "run_clm.py"


def plan(row: dict[str, Any]) -> ConfigPlan:
    """What is read of the job's arguments."""
    return read_values(SHARED | row["values"], file="a.sh", tool="transformers-examples", kind="command", program=PROGRAM)


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the script held."""
    values = SHARED | row["values"]
    with TemporaryDirectory() as folder, TemporaryDirectory() as output:
        standins.write_repository(Path(folder), {**cut(values["model_name_or_path"], row["layers"]), "dtype": "float32"})
        (data := Path(output, "data")).mkdir()
        rows = Path(data, "train.json")
        rows.write_text(f"{json.dumps({'text': 'word ' * values['block_size']})}\n" * ROWS, encoding="utf-8")
        named = {"dataset_name": str(data)} if "dataset_name" in values else {"train_file": str(rows)}
        values |= {"model_name_or_path": folder, "output_dir": f"{output}/out", **named}
        words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, os.environ["EXAMPLE"], *words]
        return row | kept_of(rehearse(command, gpu="a100-80gb", timeout=900, stdout=sys.stderr.fileno()))


if __name__ == "__main__":
    complete(Path(sys.argv[1]), run)
