"""Write `peftplan/job/grid_options.py`, the options of `sweep` as types: `python -m tools.grid_options`.

A type checker cannot derive a TypedDict from another, so the file is written from `peftplan/job/options.py`.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

from peftplan.job import options

FILE = Path(options.__file__).with_name("grid_options.py")
OWN = ("context",)
"""Options that `sweep` takes itself."""
HEAD = '''"""The options of `sweep` as types: one value of each, or several. `python -m tools.grid_options` writes this file."""

{imports}

T = TypeVar("T")
Axis: TypeAlias = T | Iterable[T] | str
"""A value as `estimate` takes it, a list, array or range of values, or text such as `1,2,4` and `512:8192:512`."""


class GridOptions(OtherWords, total=False):
    """Options of a grid."""

'''


def written() -> str:
    """The file's text."""
    tree = ast.parse(inspect.getsource(options))
    lines = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    imports = "\n".join(line for line in lines if "TypedDict" not in line) + "\nfrom typing import TypeAlias, TypeVar"
    fields = {
        node.target.id: ast.unparse(node.annotation).replace("'", '"')
        for record in tree.body
        if isinstance(record, ast.ClassDef)
        for node in record.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id not in OWN
    }
    axes = {name: one if one == "object" else f"Axis[{one}]" for name, one in fields.items()}
    text = HEAD.format(imports=imports) + "".join(f"    {name}: {axis}\n" for name, axis in axes.items())
    return _in_order(text)


def _in_order(text: str) -> str:
    """The text with its imports as ruff sorts them."""
    command = ["ruff", "check", "--quiet", "--fix", "--select", "I", "--stdin-filename", str(FILE), "-"]
    return subprocess.run([sys.executable, "-m", *command], input=text, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
