"""Maintainers: write the weight tables of built-in models whose model type has no reader.

    python tools/weight_tables.py                 # all of them, and remove the tables that an adapter has made needless
    python tools/weight_tables.py mamba-130m ...  # only these

What transformers' own model has on the meta device (`peftplan.libraries.meta`), as `peftplan.arch.table` writes it:
`data/weights/<name>.json`. Needs the extra `trace`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from peftplan.arch import catalogue
from peftplan.arch.modules import Architecture
from peftplan.arch.readers import READERS
from peftplan.arch.table import to_table
from peftplan.datafiles import DATA
from peftplan.libraries.meta import read_architecture

WEIGHTS = DATA / "weights"

SAME_TENSORS = {"kimi_k2": "deepseek_v3"}
"""Model types that are remote code, and the native type that has the same tensors (the model's note says so)."""


def architecture(entry: catalogue.ModelEntry) -> Architecture:
    """The architecture of a built-in model as transformers builds it."""
    config = dict(entry.facts()["config"])
    config["model_type"] = SAME_TENSORS.get(entry.model_type, entry.model_type)
    return replace(read_architecture(config, name=entry.name), model_type=entry.model_type)


def table_text(table: dict[str, Any]) -> str:
    """One field per line; of the lists that grow with the model, one element per line."""
    lines = []
    for key, value in table.items():
        if key in ("ties", "buffers", "modules") and value:
            rows = ",\n".join(_compact(row) for row in value)
            lines.append(f"{json.dumps(key)}:[\n{rows}\n]")
        else:
            lines.append(f"{json.dumps(key)}:{_compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="built-in names; all that need a table where none is given")
    names = parser.parse_args(argv).names
    WEIGHTS.mkdir(exist_ok=True)
    needed = {entry.name: entry for entry in catalogue.models() if entry.model_type not in READERS}
    if not names:
        for stale in WEIGHTS.glob("*.json"):
            if stale.stem not in needed:
                stale.unlink()
    for name in names or needed:
        (WEIGHTS / f"{name}.json").write_text(table_text(to_table(architecture(needed[name]))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
