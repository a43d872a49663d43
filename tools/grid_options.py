"""Write `peftplan/job/grid_options.py`, the options of `sweep` as types: `python -m tools.grid_options`.

A type checker cannot derive a TypedDict from another, so the file is written from `peftplan/job/options.py`.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from peftplan.job import options

FILE = Path(options.__file__).with_name("grid_options.py")
OWN = ("context",)
"""Options that `sweep` takes itself."""
HEAD = '''"""The options of `sweep` as types: one value of each, or several. `python -m tools.grid_options` writes this file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias, TypeVar

from peftplan.distributed.names import Place, Prefetch, StrategyName, WrapPolicy
from peftplan.job.options import OtherWords
from peftplan.job.script import Script
from peftplan.job.trainers import Autocast, Loss, TrainerName

T = TypeVar("T")
Axis: TypeAlias = T | Iterable[T] | str
"""A value as `estimate` takes it, a list, array or range of values, or text such as `1,2,4` and `512:8192:512`."""


class GridOptions(OtherWords, total=False):
    """Options of a grid."""

'''


def written() -> str:
    """The file's text."""
    fields = {
        node.target.id: ast.unparse(node.annotation).replace("'", '"')
        for record in ast.parse(inspect.getsource(options)).body
        if isinstance(record, ast.ClassDef) and record.name != "OtherWords"
        for node in record.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id not in OWN
    }
    axes = {name: one if one == "object" else f"Axis[{one}]" for name, one in fields.items()}
    return HEAD + "".join(f"    {name}: {axis}\n" for name, axis in axes.items())


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
