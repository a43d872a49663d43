"""Rehearse a tool twice, with and without its keys that are said not to change memory, and keep what both runs held.

    python -m tools.toggled_keys TOOL     completes the rows of TOOL that hold no result yet

Rows stand in `FILE`, one of JSON per job: `tool`, `sides`, the values of both runs, and `by`, how they are told apart:

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

from peftplan.job.configs.facts import facts
from peftplan.job.configs.plan import Tool
from tools import resolved_configs

FILE = Path(__file__).parents[1] / "tests" / "rehearse" / "toggled_keys.jsonl"
REASONS = {
    "call": "a call of a program beside those of its training",
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
}


def rows(tool: str | None = None) -> list[dict[str, Any]]:
    """The rows of a tool, or all."""
    every = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    return [row for row in every if tool in (None, row["tool"])]


def keys(row: Mapping[str, Any]) -> Iterator[str]:
    """The keys at which both sides of a row differ; one that a side leaves out is not one that it says to be empty."""
    left, right = row["sides"]
    absent = object()
    yield from (key for key in left | right if left.get(key, absent) != right.get(key, absent))


def jobs(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Both jobs of a row."""
    job = row.get("job", {"values": {}})
    return [job | {"values": job["values"] | side} for side in row["sides"]]


def completed(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what both sides held, or the fields at which they differ."""
    tool = TOOLS[row["tool"]]
    row = row | {"release": version(tool.package), "torch": version("torch"), "transformers": version("transformers")}
    if row["by"] == "rehearsal":
        run = import_module(tool.jobs).run
        return row | {"peaks": [{what: ran[what] for what in ("allocated", "reserved")} for ran in map(run, jobs(row))]}
    if row["by"] == "resolved config":
        return row | {"fields": {key: _differing(tool, row, key) for key in keys(row)}}
    return row | {"release": facts(row["tool"]).version}


def _differing(tool: Toggled, row: Mapping[str, Any], key: str) -> list[str]:
    """The fields of the resolved config that differ where only this key does."""
    left, right = (
        tool.resolved({name: value for name, value in job["values"].items() if name == key or name not in set(keys(row))})
        for job in jobs(row)
    )
    return sorted(name for name in {*left, *right} if _plain(left.get(name)) != _plain(right.get(name)))


def _plain(value: object) -> str:
    """A value of a config as text; of an object its class."""
    return json.dumps(value, default=lambda each: type(each).__name__, sort_keys=True)


def complete(tool: str) -> None:
    """Complete the rows of a tool and write the file again after each."""
    every = rows()
    for place, row in enumerate(every):
        if row["tool"] == tool and "release" not in row:
            every[place] = completed(row)
            FILE.write_text("".join(f"{json.dumps(each)}\n" for each in every), encoding="utf-8")


if __name__ == "__main__":
    complete(sys.argv[1])
