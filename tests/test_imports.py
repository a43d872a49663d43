"""The one-way rule: a room imports only rooms below it, and only `trace` and `measure` import what computes on tensors."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import peftplan

PACKAGE = Path(peftplan.__file__).parent

LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "dtypes", "units", "datafiles", "files", "validation", "frames"),
    ("ledger",),
    ("arch", "hardware", "allocator"),
    ("methods", "storage", "optim"),
    ("parameters", "tape"),
    ("results", "job", "depth", "memory", "analytic", "deployment", "planning"),
    ("trace", "measure", "accuracy", "oom"),
    ("integrations",),
    ("report",),
    ("cli",),
)
"""Rooms from the bottom up; a room may import its own level and those below."""
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
LAZY = ("trace", "measure")
"""Rooms that need an extra: any room may import them, inside a function only."""
DOORS = ("__init__", "__main__")
"""The package itself: its public names and its console script."""

COMPUTES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
ARRAYS = (
    *("analytic/moments.py", "analytic/grid.py"),
    *("analytic/ranked.py", "analytic/sized.py", "planning/decided.py", "planning/sweep.py"),
)
"""The files that evaluate many sizes at once, with numpy; nothing imports them before it is asked to."""
TERMINAL = {"click": ("cli",), "rich": ("report",), "matplotlib": ("report",)}
"""Which room talks to the terminal or draws, and by what."""


class Import(NamedTuple):
    """One import statement: what it names, and whether it runs only when a function is called, or never (`TYPE_CHECKING`)."""

    name: str
    lazy: bool
    line: int


def imports(tree: ast.AST, *, package: str, lazy: bool = False) -> Iterator[Import]:
    """Every import under a node, `importlib.import_module` with a text included; relative names are made absolute."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: -node.level + 1 or None] if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (Import(f"{module}.{alias.name}", lazy, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")) and node.args:
            text = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(text, ast.Constant):
                yield Import(str(text.value), lazy, node.lineno)
        in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        never_runs = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        yield from imports(node, package=package, lazy=lazy or in_function or never_runs)


def room_of(name: str) -> str | None:
    """`peftplan.arch.llama` lies in `arch`; None for a name outside the package, and for the package itself."""
    top, _, rest = name.partition(".")
    return rest.partition(".")[0] if top == "peftplan" and rest else None


def fault(room: str, imported: Import, *, file: str) -> str | None:
    """What is wrong with one import in a room, or None."""
    top = imported.name.partition(".")[0]
    if top in COMPUTES and room not in LAZY:
        return f"imports {top}, which only {' and '.join(LAZY)} may"
    if top == "numpy" and room not in LAZY and file not in ARRAYS:
        return f"imports numpy, which only {', '.join(ARRAYS)} may"
    if top in TERMINAL and room not in TERMINAL[top]:
        return f"imports {top}, which only {', '.join(TERMINAL[top])} may"
    other = room_of(imported.name)
    if other is None or room in DOORS or other not in LEVEL:
        return None
    if other in LAZY and room not in LAZY:
        return None if imported.lazy else f"imports {other} at the top; only inside a function"
    return f"imports {other}, which lies above" if LEVEL[other] > LEVEL[room] else None


def faults(package: Path) -> list[str]:
    """Every import of the package that breaks the rule: file, line, why."""
    messages = []
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        holder = ".".join(("peftplan", *parts[:-1]))
        for statement in imports(ast.parse(file.read_text(encoding="utf-8")), package=holder):
            if (why := fault(parts[0], statement, file="/".join(parts) + ".py")) is not None:
                messages.append(f"{'/'.join(parts)}.py:{statement.line} {why}")
    return messages


def test_every_room_has_its_level() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - set(DOORS) <= set(LEVEL)


def test_imports_go_one_way() -> None:
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "planted", "why"),
    [
        ("arch/llama.py", "import torch", "imports torch"),
        ("arch/llama.py", "def f():\n    import torch.nn as nn", "imports torch"),
        ("methods/lora.py", "from peft import LoraConfig as L", "imports peft"),
        ("storage/bnb.py", "from rich import print", "imports rich"),
        ("optim/names.py", "class A:\n    def f(self):\n        from click import echo", "imports click"),
        ("ledger.py", "if True:\n    import transformers", "imports transformers"),
        ("hardware/gpus.py", "import numpy as np", "imports numpy"),
        ("report/terminal.py", "import click", "imports click"),
        ("arch/llama.py", "from peftplan.methods import METHODS", "imports methods, which lies above"),
        ("storage/config.py", "def f():\n    from peftplan import planning", "imports planning, which lies above"),
        ("parameters.py", "from .planning import result", "imports planning, which lies above"),
        ("arch/llama.py", "from ..storage import FORMATS", "imports storage, which lies above"),
        ("dtypes.py", "import peftplan.arch.modules", "imports arch, which lies above"),
        ("results/estimate.py", "from peftplan.report import tabular", "imports report, which lies above"),
        ("report/tabular.py", "from peftplan.cli import options", "imports cli, which lies above"),
        ("results/estimate.py", "from peftplan.trace import meta", "imports trace at the top"),
        ("trace/libraries/meta.py", "from peftplan.report import tabular", "imports report, which lies above"),
        ("accuracy/records.py", "def f():\n    import torch", "imports torch"),
        ("accuracy/jsonl.py", "from peftplan.trace import engine", "imports trace at the top"),
        ("accuracy/records.py", "from peftplan.report import markdown", "imports report, which lies above"),
        ("units.py", "from importlib import import_module\nimport_module('torch')", "imports torch"),
        ("arch/llama.py", "import importlib\nimportlib.import_module(f'peftplan.methods.{1}')", "imports methods"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, planted: str, why: str) -> None:
    source = PACKAGE / file
    copy = tmp_path / file
    copy.parent.mkdir(exist_ok=True, parents=True)
    copy.write_text(f"{source.read_text(encoding='utf-8')}\n{planted}\n", encoding="utf-8")
    (message,) = faults(tmp_path)
    assert message.startswith(file)
    assert why in message


LOADED = """
import sys
{code}
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def loaded_by(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after `code`, which prints nothing itself."""
    done = subprocess.run([sys.executable, "-c", LOADED.format(code=code)], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


RUN = "from contextlib import suppress\nfrom peftplan.cli import main\nwith suppress(SystemExit):\n    main({args!r})"


def test_importing_peftplan_loads_next_to_nothing() -> None:
    assert loaded_by("import peftplan").isdisjoint({*COMPUTES, "numpy", "rich", "pydantic", "click", "huggingface_hub"})


def test_the_command_line_loads_no_tensors() -> None:
    assert loaded_by("import peftplan.cli").isdisjoint({*COMPUTES, "numpy", "rich", "pydantic", "huggingface_hub"})


@pytest.mark.parametrize(
    ("args", "needs"),
    [
        (["estimate", "llama-2-70b", "--method", "qlora", "--r", "16", "--gpu", "rtx-4090"], {"click", "pydantic"}),
        (["estimate", "llama-2-7b", "--format", "json"], {"click", "pydantic"}),
        (["inspect", "mixtral-8x7b", "--match", "all-linear"], {"click", "rich", "pydantic"}),
        (["serve", "llama-2-7b", "--method", "lora"], {"click", "rich", "pydantic"}),
        (["models", "llama"], {"click", "rich"}),
        (["gpus"], {"click", "rich"}),
    ],
)
def test_a_command_loads_only_what_it_needs(args: list[str], needs: set[str]) -> None:
    loaded = loaded_by(RUN.format(args=args))
    assert needs <= loaded
    assert loaded.isdisjoint({*COMPUTES, "numpy", "huggingface_hub"})
    assert "rich" in needs or "rich" not in loaded
