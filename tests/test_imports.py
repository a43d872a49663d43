"""One direction: a room imports only rooms below it, no file stands in a circle, few rooms import what computes on tensors."""

from __future__ import annotations

import ast
import subprocess
import sys
from ast import literal_eval
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import peftplan

PACKAGE = Path(peftplan.__file__).parent
SOURCES = {file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8") for file in sorted(PACKAGE.rglob("*.py"))}

LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "units", "arrays", "datafiles", "scans", "versions"),
    ("dtypes", "files", "validation", "frames", "hardware"),
    ("ledger", "arch", "allocator"),
    ("methods", "storage", "optim", "tape"),
    ("parameters", "depth"),
    ("distributed",),
    ("deployment", "results"),
    ("libraries",),
    ("job",),
    ("memory", "trace.cuda"),
    ("analytic", "trace.events"),
    ("trace",),
    ("planning",),
    ("accuracy", "oom", "rehearse"),
    ("measure", "report"),
    ("integrations", "cli"),
)
"""Rooms from the bottom up; a room imports only those of lower levels, wherever the import stands."""
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
LAZY = ("libraries", "trace", "trace.cuda", "trace.events", "measure", "rehearse")
"""Rooms that need an extra: other rooms import them inside a function only."""
DOORS = ("__init__", "__main__")
"""The package itself: its public names and its console script."""
ASKS_THE_DOOR = ("frames.py", "methods/__init__.py")
"""Files that call a public name of the package: notebooks ask a result for HTML by a method of its own, and `peftplan.methods` is
both a room and a function."""

COMPUTES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
ARRAYS = (
    *("arrays.py", "analytic/moments.py", "results/grid.py"),
    *("analytic/ranked.py", "analytic/sized.py", "analytic/worlds.py"),
    *("planning/decided.py", "planning/sweep_points.py", "planning/at_sizes.py"),
)
"""The files that evaluate many sizes at once, with numpy; nothing imports them earlier. `arrays` only names its types."""
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
    """`peftplan.trace.cuda.flash` lies in `trace.cuda`; None for a name outside the package, and for the package itself."""
    top, _, rest = name.partition(".")
    if top != "peftplan" or not rest:
        return None
    folder = ".".join(rest.split(".")[:2])
    return folder if folder in LEVEL else rest.partition(".")[0]


def fault(room: str, imported: Import, *, file: str) -> str | None:
    """What is wrong with one import in a room, or None."""
    top = imported.name.partition(".")[0]
    if top in COMPUTES and room not in LAZY:
        return f"imports {top}, which only {' and '.join(LAZY)} may"
    if top == "numpy" and room not in LAZY and file not in ARRAYS:
        return f"imports numpy, which only {', '.join(ARRAYS)} may"
    if top in TERMINAL and room not in TERMINAL[top]:
        return f"imports {top}, which only {', '.join(TERMINAL[top])} may"
    if room in DOORS or top != "peftplan":
        return None
    other = room_of(imported.name)
    if other not in LEVEL:
        return None if file in ASKS_THE_DOOR or other else "imports the package itself, whose names lead to every room"
    if other == room:
        return None
    if LEVEL[other] >= LEVEL[room]:
        return f"imports {other}, which lies {'above' if LEVEL[other] > LEVEL[room] else 'beside'}"
    return (
        f"imports {other} at the top; only inside a function"
        if not imported.lazy and other in LAZY and room not in LAZY
        else None
    )


@cache
def statements(file: str, source: str) -> tuple[Import, ...]:
    """The imports of a file, which is named from the package on."""
    return tuple(imports(ast.parse(source), package=".".join(("peftplan", *Path(file).parts[:-1]))))


def faults(sources: Mapping[str, str]) -> list[str]:
    """Every import that breaks the rule: file, line, why. `sources`: file → its text."""
    messages = []
    for file, source in sources.items():
        room = room_of(f"peftplan.{file.removesuffix('.py').replace('/', '.')}") or ""
        for statement in statements(file, source):
            if (why := fault(room, statement, file=file)) is not None:
                messages.append(f"{file}:{statement.line} {why}")
    return messages


def circles(sources: Mapping[str, str]) -> list[set[str]]:
    """Modules that import each other, directly or through others; the package itself, which names what is public, is left out."""
    files = {f"peftplan.{file.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__"): file for file in sources}
    below: dict[str, set[str]] = {}
    for module, file in files.items():
        below[module] = set()
        for statement in statements(file, sources[file]):
            name = statement.name
            while name and name not in files:
                name = name.rpartition(".")[0]
            below[module] |= {name} - {"", "peftplan", module}
    return [circle for circle in components(below) if len(circle) > 1]


def components(below: Mapping[str, set[str]]) -> Iterator[set[str]]:
    """The strongly connected parts of a graph: modules that reach each other."""
    reached = {node: {node} for node in below}
    todo = set(below)
    while todo:
        node = todo.pop()
        more = set().union(*(reached[other] for other in below[node])) - reached[node]
        if more:
            reached[node] |= more
            todo |= {other for other, targets in below.items() if node in targets}
    seen: set[str] = set()
    for node in below:
        if node not in seen:
            together = {other for other in reached[node] if node in reached[other]}
            seen |= together
            yield together


def test_every_room_has_its_level() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - set(DOORS) == {room for room in LEVEL if "." not in room}
    assert all((PACKAGE / room.replace(".", "/") / "__init__.py").exists() for room in LEVEL if "." in room)


def test_imports_go_one_way() -> None:
    assert faults(SOURCES) == []


def test_no_file_stands_in_a_circle() -> None:
    assert circles(SOURCES) == []


def test_a_planted_circle_is_found() -> None:
    """Through three files, by imports of each kind."""
    planted = {
        "tape/one.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from peftplan.tape.two import B",
        "tape/two.py": "def f():\n    from peftplan.tape import three",
        "tape/three.py": "from .one import A",
        "tape/four.py": "from peftplan.tape import one",
    }
    assert circles(SOURCES | planted) == [{"peftplan.tape.one", "peftplan.tape.two", "peftplan.tape.three"}]


FORMS = """
from peftplan.{room} import a
def f():
    import peftplan.{room} as a
if TYPE_CHECKING:
    from peftplan.{room} import A
g = lambda: import_module("peftplan.{room}")
"""
"""An import at the top, in a function, for types alone, by a string."""


@pytest.mark.parametrize("room", LEVEL)
def test_of_two_rooms_only_one_may_import_the_other(room: str) -> None:
    for other in LEVEL.keys() - {room}:
        messages = faults({f"{room.replace('.', '/')}/planted.py": FORMS.format(room=other)})
        if LEVEL[other] >= LEVEL[room]:
            assert len(messages) == 4, other
            assert all(f"imports {other}, which lies " in message for message in messages)
        else:
            needs_extra = other in LAZY and room not in LAZY
            assert len(messages) == needs_extra, other
            assert all(message.endswith("only inside a function") for message in messages)


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
        ("results/estimate.py", "from peftplan.trace import engine", "imports trace, which lies above"),
        ("planning/estimate.py", "from peftplan.trace import engine", "imports trace at the top"),
        ("trace/cuda/flash.py", "def f():\n    from peftplan.trace import engine", "imports trace, which lies above"),
        ("optim/names.py", "from peftplan.storage import FORMATS", "imports storage, which lies beside"),
        ("results/estimate.py", "def f():\n    import peftplan", "imports the package itself"),
        ("libraries/meta.py", "from peftplan.report import tabular", "imports report, which lies above"),
        ("accuracy/records.py", "def f():\n    import torch", "imports torch"),
        ("accuracy/jsonl.py", "from peftplan.trace import engine", "imports trace at the top"),
        ("accuracy/records.py", "from peftplan.report import markdown", "imports report, which lies above"),
        ("units.py", "from importlib import import_module\nimport_module('torch')", "imports torch"),
        ("arch/llama.py", "import importlib\nimportlib.import_module(f'peftplan.methods.{1}')", "imports methods"),
    ],
)
def test_a_planted_import_is_found(file: str, planted: str, why: str) -> None:
    (message,) = faults(SOURCES | {file: f"{SOURCES[file]}\n{planted}\n"})
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


def test_the_main_job_loads_no_formulas_of_other_jobs() -> None:
    code = RUN.format(args=["estimate", "llama-2-70b", "--method", "qlora", "--r", "16", "--gpu", "h100"])
    code = f"{code}\nimport sys\nprint(*[name for name in sys.modules if name.startswith('peftplan.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    of_others = "distributed.strategy analytic.generation deployment.checkpoint memory.delta_rule methods.bottleneck"
    assert not {f"peftplan.{name}" for name in of_others.split()} & set(done.stdout.splitlines()[-1].split())


def test_records_of_the_main_job_evaluate_their_annotations() -> None:
    """Under the `__future__` import a NamedTuple compiles a text for each field: half of what a record costs at the start."""
    code = RUN.format(args=["estimate", "llama-2-70b", "--method", "qlora", "--gpu", "h100", "--format", "json"])
    code = f"{code}\nimport sys\nprint([m.__file__ for n, m in sys.modules.items() if n.startswith('peftplan.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    paths = [Path(path) for path in literal_eval(done.stdout.splitlines()[-1]) if path.endswith(".py")]
    records = [text for path in paths if "(NamedTuple)" in (text := path.read_text(encoding="utf-8"))]
    assert len(records) > 40
    assert not [text.partition("\n")[0] for text in records if "from __future__ import annotations" in text]
