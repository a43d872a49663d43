"""Published training configs: parsed values, each with its repository, path, commit and licence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_values
from peftplan.job.configs.shell import commands_of

FOLDER = Path(__file__).parent / "data"


def records(*names: str) -> Iterator[dict[str, Any]]:
    """The records of some files, of all without names; a few hold no mapping and are left out."""
    for path in sorted(FOLDER.glob("*.jsonl")):
        if not names or path.stem in names:
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                if isinstance(record["values"], dict):
                    yield record


def _sum(value: Any) -> Any:
    """The value of a shell's `$(expr 16 / 2)`, which records hold as `EXPR{16/2`."""
    if not isinstance(value, str) or not value.startswith("EXPR{"):
        return value
    (command,) = commands_of(f"swift sft --value $(({value.removeprefix('EXPR{').rstrip('}')}))", file="a.sh")
    return command.values["value"]


def plan(record: dict[str, Any], *, tool: str | None = None) -> ConfigPlan:
    """What is read of a record."""
    kind = "calls" if "calls" in record["values"] else "command" if record.get("kind") == "command" else "values"
    values = {key: _sum(value) for key, value in record["values"].items()} if kind == "command" else record["values"]
    header = {"nproc_per_node": ranks} if (ranks := record.get("nproc_per_node")) else {}  # of a recipe of torchtune
    environment = header | {name: value for name, value in record.get("env", {}).items() if name != "file"}
    program = record.get("program", "")
    if kind == "command" and not program.endswith(".py"):  # behind the launcher's last option
        words = (word for value in values.values() if isinstance(value, list) for word in value)
        program = " ".join([program, *[word for word in words if str(word).endswith(".py")][:1]])
    return read_values(values, file=record["path"], tool=tool, kind=kind, program=program, **environment)
