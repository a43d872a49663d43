"""Rehearse `llamafactory-cli train` and keep what it held beside the values that peftplan reads of its config.

    python -m tools.rehearsed_llamafactory FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: `values` of the config, how many `layers` of the model run, `gpus` if more than one, and the
`quantization_config` of the repository's config.json. Rows are as long as `cutoff_len` says; with `do_eval` the program ends
itself. Needs llamafactory 0.9.5, the package of the optimizer that a config names, and the CUDA build of torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from peftplan.datafiles import load
from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_values
from peftplan.job.repositories import copied_model
from peftplan.rehearse import rehearse
from peftplan.rehearse.inside import standins
from tools.rank_grid import cut
from tools.rehearsed_recipes import WITHOUT_NVCC, complete, kept_of

ROWS = 64
SHARED: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "dataset": "rows",
    "template": "default",
    "report_to": "none",
    "save_strategy": "no",
    "max_steps": 4,
}
"""Values of every job."""
CARD = "a100-80gb"
PROGRAM = "from llamafactory.train.tuner import run_exp; run_exp()"
"""What `llamafactory-cli train` runs on one card (`launcher.py`)."""


def plan(row: dict[str, Any]) -> ConfigPlan:
    """What is read of the job's config."""
    return read_values(SHARED | row["values"], file="a.yaml", tool="llamafactory")


def _launch_file(path: str) -> dict[str, Any]:
    """What the file of DeepSpeed holds that the tool ships under this path."""
    return dict(load("configs/launch.json", dict)["llamafactory"][Path(path).stem]["values"])


def options(row: dict[str, Any]) -> dict[str, Any]:
    """The job as `peftplan.estimate` takes it: what was read, over the first layers of the model."""
    ranks = {"gpus": row["gpus"]} if "gpus" in row else {}
    return {"model": cut(plan(row).model, row["layers"]), **plan(row).options, **ranks}


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the tool held."""
    values = row["values"]
    with TemporaryDirectory() as folder, TemporaryDirectory() as output:
        config = cut(copied_model(values["model_name_or_path"]) or values["model_name_or_path"], row["layers"])
        packed = {"quantization_config": row["quantization_config"]} if "quantization_config" in row else {}
        standins.write_repository(Path(folder), {**config, "dtype": "bfloat16", **packed})
        described: dict[str, Any]
        answer, described = "g" * 8 * values["cutoff_len"], {"file_name": "rows.json"}
        text = {"instruction": "a", "input": "", "output": answer}
        if values.get("stage") == "rm":
            text |= {"chosen": answer, "rejected": answer}
            described |= {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}}
        Path(output, "rows.json").write_text(json.dumps([text] * ROWS), encoding="utf-8")
        Path(output, "dataset_info.json").write_text(json.dumps({"rows": described}), encoding="utf-8")
        places = {"model_name_or_path": folder, "dataset_dir": output, "output_dir": f"{output}/saved"}
        if "deepspeed" in values:
            places["deepspeed"] = f"{output}/deepspeed.json"
            Path(places["deepspeed"]).write_text(json.dumps(_launch_file(values["deepspeed"])), encoding="utf-8")
        file = Path(output, "config.yaml")
        file.write_text(yaml.safe_dump(SHARED | values | places), encoding="utf-8")
        command = [sys.executable, "-c", (WITHOUT_NVCC if packed else "") + PROGRAM, str(file)]
        whole = bool(values.get("do_eval"))  # it evaluates behind the last step
        result = rehearse(
            command,
            world_size=row.get("gpus"),
            gpu=CARD,
            steps=0 if whole else 3,
            timeout=900,
            stdout=sys.stderr.fileno(),
        )
        return row | kept_of(result, ended="program" if whole else "steps")


if __name__ == "__main__":
    complete(Path(sys.argv[1]), run)
