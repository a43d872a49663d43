"""Rehearse a script of TRL and keep what it held beside the values that peftplan reads of its config.

    python -m tools.rehearsed_trl FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: `values` of the config, how many `layers` of the model run, and the `script` if not `sft`. Rows
are as long as `max_length` says. Needs trl, peft and the CUDA build of torch.
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
SHARED: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "max_steps": 4}
"""Values of every job."""
CARD = "a100-80gb"


def plan(row: dict[str, Any]) -> ConfigPlan:
    """What is read of the job's config."""
    return read_values(SHARED | row["values"], file="a.yaml", tool="trl", program=f"trl {row.get('script', 'sft')}")


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the tool held."""
    values = row["values"]
    with TemporaryDirectory() as folder, TemporaryDirectory() as output:
        standins.write_repository(Path(folder), {**cut(values["model_name_or_path"], row["layers"]), "dtype": "bfloat16"})
        data = Path(output, "data")
        data.mkdir()
        for split in ("train", "test"):
            text = json.dumps({"text": "g" * 8 * values["max_length"]})
            Path(data, f"{split}.jsonl").write_text(f"{text}\n" * ROWS, encoding="utf-8")
        places = {"model_name_or_path": folder, "dataset_name": str(data), "output_dir": f"{output}/saved"}
        file = Path(output, "config.yaml")
        file.write_text(yaml.safe_dump(SHARED | values | places), encoding="utf-8")
        command = [sys.executable, "-m", f"trl.scripts.{row.get('script', 'sft')}", "--config", str(file)]
        return row | kept_of(rehearse(command, gpu=CARD, timeout=900, stdout=sys.stderr.fileno()))


if __name__ == "__main__":
    complete(Path(sys.argv[1]), run)
