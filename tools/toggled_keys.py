"""Rehearse a tool twice, with and without its keys that are said not to change memory, and keep what both runs held.

    python -m tools.toggled_keys TOOL [FILE]     completes the rows of TOOL that hold no result yet

Rows stand in `KEPT`, or FILE, one of JSON per job: `tool`, `sides`, the values of both runs, and `by`, how they are told apart:

- `rehearsal`: a `job` of `tools.rehearsed_TOOL` runs on the emulated card with the values of each side. The row keeps `peaks`.
- `resolved config`: for keys that no job reaches, such as paths of data. The tool resolves its config with each pair of values
  alone; the row keeps, for each key, which `fields` of the resolved config differ.
- `neither`: `why` names one of `REASONS`.

Needs the tool of this release, and for rehearsals the CUDA build of torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from peftplan.job.configs.documents import flat
from peftplan.job.configs.facts import facts
from peftplan.job.configs.plan import Tool
from tools import resolved_configs

KEPT = Path(__file__).parents[1] / "tests" / "rehearse" / "toggled_keys.jsonl"
REASONS = {
    "call": "a call of a program beside those of its training",
    "megatron": "an argument of Megatron's commands, whose packages do not run here",
    "object": "an object that the program makes: the call which makes it has its keys",
    "server": "an argument for a server of vLLM, to which the tool connects while it reads it",
    "trains": "the switch of the training itself, without which nothing is counted",
}
"""Why neither a rehearsal nor a resolved config can have a key at two values."""


class Toggled(NamedTuple):
    """How a tool runs."""

    package: str
    jobs: str
    """The module whose `run` rehearses a job, and whose `plan` reads it."""
    resolved: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    """Values of a config → the fields of what the tool makes of it."""


TOOLS: dict[Tool, Toggled] = {
    "llamafactory": Toggled("llamafactory", "tools.rehearsed_llamafactory", resolved_configs.llamafactory),
    "llamafactory-v1": Toggled("llamafactory", "tools.rehearsed_llamafactory_v1", resolved_configs.llamafactory_v1),
    "transformers-examples": Toggled("transformers", "tools.rehearsed_examples", resolved_configs.examples),
    "axolotl": Toggled("axolotl", "tools.rehearsed_axolotl", resolved_configs.axolotl),
    "swift": Toggled("ms-swift", "tools.rehearsed_swift", resolved_configs.swift),
    "peft": Toggled("peft", "", resolved_configs.peft),
    "torchtune": Toggled("torchtune", "tools.rehearsed_recipes", resolved_configs.torchtune),
    "nemo-automodel": Toggled("nemo_automodel", "tools.rehearsed_automodel", resolved_configs.automodel),
    "trl": Toggled("trl", "tools.rehearsed_trl", resolved_configs.trl),
    "unsloth": Toggled("unsloth", "tools.rehearsed_unsloth", resolved_configs.unsloth),
}


def rows(file: Path = KEPT) -> list[dict[str, Any]]:
    """All rows."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def keys(row: Mapping[str, Any]) -> Iterator[str]:
    """The keys at which both sides of a row differ; one that a side leaves out is not one that it says to be empty."""
    left, right = map(flat, row["sides"])
    absent = object()
    yield from (key for key in left | right if left.get(key, absent) != right.get(key, absent))


def jobs(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Both jobs of a row."""
    job = row.get("job", {"values": {}})
    return [job | {"values": job["values"] | side} for side in row["sides"]]


def completed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what both sides held, or the fields at which they differ; as it was where a side did not reach its steps."""
    tool = TOOLS[row["tool"]]
    with_versions = row | {"release": version(tool.package), "torch": version("torch"), "transformers": version("transformers")}
    if row["by"] == "rehearsal":
        ran = [import_module(tool.jobs).run(job) for job in jobs(row)]
        if any("allocated" not in each for each in ran):
            return row
        return with_versions | {"peaks": [{what: each[what] for what in ("allocated", "reserved")} for each in ran]}
    if row["by"] == "resolved config":
        names = dict.fromkeys(key.partition(".")[0] for key in keys(row))
        return with_versions | {"fields": {name: _differing(tool, row, name) for name in names}}
    return row | {"release": facts(row["tool"]).version}


def _differing(tool: Toggled, row: Mapping[str, Any], name: str) -> list[str]:
    """The fields of the resolved config that differ where only this value does."""
    values = row["job"]["values"]
    left, right = (flat(tool.resolved(values | {key: side[key] for key in side if key == name})) for side in row["sides"])
    return sorted(field for field in {*left, *right} if _plain(left.get(field)) != _plain(right.get(field)))


def _plain(value: object) -> str:
    """A value of a config as text; of an object its class."""
    return json.dumps(value, default=lambda each: type(each).__name__, sort_keys=True)


def complete(tool: str, file: Path) -> None:
    """Complete the rows of a tool and write the file again after each."""
    every = rows(file)
    for place, row in enumerate(every):
        if row["tool"] == tool and "release" not in row:
            every[place] = completed(row)
            file.write_text("".join(f"{json.dumps(each)}\n" for each in every), encoding="utf-8")


if __name__ == "__main__":
    complete(sys.argv[1], Path([*sys.argv, KEPT][2]))
