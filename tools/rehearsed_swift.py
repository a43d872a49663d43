"""Rehearse ms-swift's `swift sft` and keep what it held beside the arguments that peftplan reads of it.

    python -m tools.rehearsed_swift FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: `values`, the arguments of `swift sft`, and how many `layers` of the model run. Rows are as long
as `max_length` says, and each token is scored. Needs ms-swift 4.6.0 and the CUDA build of torch.
"""

from __future__ import annotations

import json
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
SHARED: dict[str, Any] = {
    "use_hf": True,
    "dataset": "rows.jsonl",
    "split_dataset_ratio": 0,
    "torch_dtype": "bfloat16",
    "template": "dummy",
    "truncation_strategy": "right",
    "loss_scale": "all",
    "save_strategy": "no",
    "report_to": "none",
    "num_train_epochs": 3,
}
"""Arguments of every job."""
PROGRAM = "import sys; from swift import sft_main; sft_main(sys.argv[1:])"


def plan(row: dict[str, Any]) -> ConfigPlan:
    """What is read of the job's arguments."""
    environment = {"NPROC_PER_NODE": str(row["gpus"])} if row.get("gpus", 1) > 1 else {}
    return read_values(SHARED | row["values"], file="sft.sh", tool="swift", kind="command", program="swift sft", **environment)


def options(row: dict[str, Any]) -> dict[str, Any]:
    """The job as `peftplan.estimate` takes it: what was read, over the first layers of the model."""
    return {"model": cut(row["values"]["model"], row["layers"]), **plan(row).options}


def arguments(row: dict[str, Any], folder: str, output: str) -> list[str]:
    """The command line."""
    values = SHARED | row["values"] | {"model": folder, "dataset": f"{output}/rows.jsonl", "output_dir": output}
    words = {key: value if isinstance(value, list) else [value] for key, value in values.items()}
    return [word for key, listed in words.items() for word in (f"--{key}", *map(str, listed))]


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the tool held."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as output:
        standins.write_repository(Path(folder), {**cut(row["values"]["model"], row["layers"]), "dtype": "bfloat16"})
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "g" * 8 * row["values"]["max_length"]}]
        Path(output, "rows.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * ROWS, encoding="utf-8")
        command = [sys.executable, "-c", PROGRAM, *arguments(row, folder, output)]
        ranks = row.get("gpus")
        return row | kept_of(rehearse(command, world_size=ranks, gpu="a100-80gb", timeout=900, stdout=sys.stderr.fileno()))


if __name__ == "__main__":
    complete(Path(sys.argv[1]), run)
