"""Rehearse torchtune's own recipes and keep what they held beside the options of `peftplan estimate` that say the same job.

    python -m tools.rehearsed_recipes FILE     runs the jobs of FILE that hold nothing yet

FILE holds a row of JSON per job: `job` (MODEL and options), `recipe` and `config` as torchtune ships them, and `overrides`. Rows
are as long as `--seq-len` says, and each label but the last of a row is scored. The `values` of a row stand in place of a shipped
config. Needs torchtune of commit bd2a0fc7 with its folder `recipes`, and the CUDA build of torch.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from peftplan.arch import catalogue
from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_values
from peftplan.rehearse import rehearse
from peftplan.rehearse.inside import standins
from peftplan.results.rehearsal import Rehearsal

IGNORED = -100
ROWS = 64
WITHOUT_NVCC = "from gptqmodel.utils.cpp import TorchOpsJitExtension; TorchOpsJitExtension.load = lambda self: False; "
"""Before a program of a tool: gptqmodel compiles no kernel for the machine."""


class Tokenizer:
    """What recipes ask of a tokenizer whose rows are tokens already."""

    pad_id = 0
    eos_id = 1


class Rows:
    """Rows of one length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        """How many there are."""
        return ROWS

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        """Tokens, and labels as torchtune's datasets shift them; a recipe of pairs reads two completions."""
        tokens = [(7 * number + place) % 1000 + 5 for place in range(self.length)]
        pair = {f"{kind}_{what}": tokens for kind in ("chosen", "rejected") for what in ("input_ids", "labels")}
        return {"tokens": tokens, "labels": [*tokens[1:], IGNORED], **pair}


def tokenizer() -> Tokenizer:
    """A component of a config."""
    return Tokenizer()


def rows(tokenizer: Tokenizer, length: int) -> Rows:
    """A component of a config."""
    return Rows(length)


def plan(row: dict[str, Any]) -> ConfigPlan:
    """What is read of the values of a row."""
    return read_values(row["values"], file="a.yaml", tool="torchtune")


def run(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what the recipe held."""
    words = shlex.split(row["job"])
    package = importlib.util.find_spec("recipes")
    entry = catalogue.find(words[0])
    assert package is not None
    assert package.origin is not None
    assert entry is not None
    recipes = Path(package.origin).parent
    shipped = row.get("values") or _shipped(recipes / "configs" / f"{row['config']}.yaml")
    with TemporaryDirectory() as folder, TemporaryDirectory() as second, TemporaryDirectory() as output:
        standins.write_repository(Path(folder), entry.repo_id)
        settings = [*_settings(shipped, folder, output, length=words[words.index("--seq-len") + 1]), *row.get("overrides", ())]
        if "--teacher-model" in words:
            teacher = catalogue.find(words[words.index("--teacher-model") + 1])
            assert teacher is not None
            standins.write_repository(Path(second), teacher.repo_id)
            settings += _checkpoint("teacher_checkpointer", second)
        written = Path(output, "config.yaml")
        written.write_text(yaml.safe_dump(_without_formats(shipped)), encoding="utf-8")
        command = [sys.executable, str(recipes / f"{row['recipe']}.py"), "--config", str(written), *settings]
        ranks = int(words[words.index("--gpus") + 1]) if "--gpus" in words else None
        return row | kept_of(rehearse(command, world_size=ranks, timeout=900, stdout=sys.stderr.fileno()))


def _shipped(config: Path) -> dict[str, Any]:
    """The values of a config."""
    values: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    return values


def _without_formats(shipped: dict[str, Any]) -> dict[str, Any]:
    """The config, whose lists of checkpoint files can be replaced: a list does not replace the format of their names."""
    listed = [name for name, part in shipped.items() if isinstance(part, dict) and isinstance(part.get("checkpoint_files"), dict)]
    return shipped | {name: shipped[name] | {"checkpoint_files": []} for name in listed}


def kept_of(result: Rehearsal, *, ended: str = "steps") -> dict[str, Any]:
    """What a row keeps of a rehearsal, if it `ended` as it should."""
    rank = result.largest_rank
    if rank is None or result.ended != ended:
        return {"ended": result.ended}
    return {
        "ended": ended,
        "allocated": rank.peak_allocated,
        "reserved": rank.peak_reserved,
        "by_phase": dict(rank.peak_by_phase),
        "reserved_by_phase": dict(rank.reserved_by_phase),
        "host": dict(rank.host),
    }


def _settings(shipped: dict[str, Any], folder: str, output: str, *, length: str) -> Iterator[str]:
    """Settings that put the stand-in, its rows and one micro batch per step in place of what the config names."""
    yield f"output_dir={output}"
    for part in ("checkpointer", *(("ref_checkpointer",) if "ref_checkpointer" in shipped else ())):
        yield from _checkpoint(part, folder)
    parts = [part for part in ("tokenizer", "dataset", "dataset_val") if part in shipped]
    yield f"tokenizer._component_={__name__}.tokenizer"
    for part in parts[1:]:
        yield from (f"{part}._component_={__name__}.rows", f"{part}.length={length}")
    yield from (f"~{part}.{key}" for part in parts for key in shipped[part] if key != "_component_")
    yield from (f"metric_logger.log_dir={output}/logs", "gradient_accumulation_steps=1")


def _checkpoint(part: str, folder: str) -> Iterator[str]:
    """Settings by which a checkpointer reads what lies in a folder."""
    files = sorted(path.name for path in Path(folder).glob("*.safetensors"))
    yield from (f"{part}.checkpoint_dir={folder}", f"{part}.checkpoint_files=[{','.join(files)}]")


def complete(file: Path, run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Run the jobs of a file whose peaks it does not hold yet, and write it again after each."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for place, row in enumerate(rows):
        if "allocated" not in row:
            rows[place] = run(row)
            file.write_text("".join(f"{json.dumps(each)}\n" for each in rows), encoding="utf-8")


if __name__ == "__main__":
    from tools import rehearsed_recipes  # under the name that a config can import

    complete(Path(sys.argv[1]), rehearsed_recipes.run)
