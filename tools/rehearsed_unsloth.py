"""Rehearse a program of Unsloth and keep what it held beside the values that peftplan reads of its calls.

    python -m tools.rehearsed_unsloth FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: `values`, the arguments of the calls that `CALLS` names, how many `layers` of the model run, and
the `loader` where it is not FastLanguageModel.
Rows are as long as `max_seq_length` says. Needs unsloth, and the CUDA build of torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_text
from peftplan.rehearse import rehearse
from peftplan.rehearse.inside import standins
from tools.rank_grid import cut
from tools.rehearsed_recipes import complete, kept_of

CALLS = {
    "load": "model, tokenizer = LOADER.from_pretrained({})",
    "lora": "model = LOADER.get_peft_model(model, {})",
    "args": "arguments = SFTConfig({})",
    "trainer": "trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, {})",
}
"""Kind of a call → the call, whose arguments a row names."""
DATA = 'rows = Dataset.from_dict({{"text": ["{}"] * 64}})'
IMPORTS = "\n".join(
    (
        "from unsloth import LOADER",
        "from datasets import Dataset",
        "from transformers import AutoModelForCausalLM",
        "from trl import SFTConfig, SFTTrainer",
    )
)
SHARED: dict[str, Any] = {"args": {"report_to": "none", "save_strategy": "no", "max_steps": 4, "output_dir": "saved"}}
"""Arguments of every job."""
CARD = "a100-80gb"


def program(row: dict[str, Any], model: str) -> str:
    """The program of a job. A value in brackets is a name of the program."""
    calls = {kind: {**SHARED.get(kind, {}), **row["values"].get(kind, {})} for kind in CALLS}
    calls["load"]["model_name"] = model
    spelled = {
        kind: ", ".join(f"{name}={_spelled(value)}" for name, value in arguments.items()) for kind, arguments in calls.items()
    }
    data = DATA.format("abcd" * 2 * calls["load"]["max_seq_length"])
    lines = (IMPORTS, data, *(call.format(spelled[kind]) for kind, call in CALLS.items()), "trainer.train()")
    return "\n".join(lines).replace("LOADER", row.get("loader", "FastLanguageModel"))


def _spelled(value: object) -> str:
    """A value in Python."""
    return value[1:-1] if isinstance(value, str) and value.startswith("<") else repr(value)


def plan(row: dict[str, Any]) -> ConfigPlan:
    """What is read of the job's program."""
    return read_text(program(row, row["model"]), file="a.py")


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the tool held."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as output:
        standins.write_repository(Path(folder), {**cut(row["model"], row["layers"]), "dtype": "bfloat16"})
        file = Path(output, "program.py")
        file.write_text(program(row, folder), encoding="utf-8")
        command = [sys.executable, str(file)]
        return row | kept_of(rehearse(command, gpu=CARD, timeout=900, stdout=sys.stderr.fileno()))


if __name__ == "__main__":
    complete(Path(sys.argv[1]), run)
