"""Refresh the arguments of components in `data/configs`: functions and classes that a config names by their dotted path.

    python -m tools.component_arguments TOOL LIBRARIES RELEASE=FOLDER…

Each FOLDER holds a release of the tool's package, as an unpacked wheel does, and LIBRARIES the packages that it calls; where two
releases have one component, both lists count. They are parsed, never imported. Arguments passed on as `**kwargs` are
those of what it calls; where no signature ends them, the list ends in `*`, and any name is an argument.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tools.config_schemas import FOLDER, written

COMPONENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torchtune": (
        "torchtune",
        (
            *(
                "torchtune.datasets.*",
                "torchtune.models.*",
                "torchtune.training.*",
                "torchtune.modules.loss.*",
                "torchtune.rlhf.*",
            ),
            *("torchtune.data.*", "torchtune.dev.*", "torchtune.modules.*okenizer*", "torch.nn.CrossEntropyLoss"),
        ),
    ),
    "nemo-automodel": (
        "nemo_automodel",
        (
            *("nemo_automodel.components.datasets.*", "nemo_automodel.components.loss.*", "nemo_automodel.components.eval.*"),
            *("nemo_automodel.components.training.*", "nemo_automodel.components.checkpoint.config.*"),
            *("nemo_automodel.components.loggers.*", "nemo_automodel.components.optim.scheduler.*"),
            "nemo_automodel.components.optim.optimizer.LRSchedulerConfig",
        ),
    ),
}
"""Tool → its package, and patterns of the components of its configs."""
BUILDERS = "datasets.load_dataset"
"""The function that passes `**kwargs` to one of several classes: those in `datasets/packaged_modules`. Lists refer to its own."""
ALIASES = "_DATASET_CONFIGS"
"""The mapping of a module in which NeMo Automodel names the class whose fields replace the arguments of a function."""
ANY = "*"
MOST_CALLS = 8
"""The longest chain of functions through which arguments are passed on."""


class Definition(NamedTuple):
    """A function, a class, or an assignment in a module."""

    node: ast.FunctionDef | ast.ClassDef | ast.expr
    module: str


class Sources:
    """Packages in some folders, parsed where a name needs it."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        self.module = cache(self._module)

    def file(self, module: str) -> Path | None:
        """The file of a module."""
        bases = [folder.joinpath(*module.split(".")) for folder in self.folders]
        paths = [path for base in bases for path in (base / "__init__.py", base.parent / f"{base.name}.py")]
        return next(filter(Path.is_file, paths), None)

    def _module(self, module: str) -> dict[str, ast.AST | str]:
        """Name → what defines it in a module, or the dotted path from which it is imported. Of all names: `* 1`, `* 2` …"""
        path = self.file(module)
        if path is None:
            return {}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names: dict[str, ast.AST | str] = {}
        for node in (each for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for each in node.names:
                name = f"* {len(names)}" if each.name == "*" else each.asname or each.name
                names.setdefault(name, source if each.name == "*" else f"{source}.{each.name}")
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                names[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                names[node.target.id] = node.value
        return names

    def find(self, dotted: str, seen: frozenset[str] = frozenset()) -> Definition | None:
        """The definition of a dotted path."""
        module, _, name = dotted.rpartition(".")
        if not module or dotted in seen:
            return None
        seen |= {dotted}
        if self.file(module) is None:  # a method of a class
            outer = self.find(module, seen)
            body = outer.node.body if outer is not None and isinstance(outer.node, ast.ClassDef) else []
            method = next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == name), None)
            return None if method is None or outer is None else outer._replace(node=method)
        names = self.module(module)
        target = names.get(name)
        if isinstance(target, str):
            return self.find(target, seen)
        if isinstance(target, (ast.FunctionDef, ast.ClassDef, ast.expr)):
            return Definition(target, module)
        stars = [source for key, source in names.items() if key.startswith("* ") and isinstance(source, str)]
        return next((each for source in stars if (each := self.find(f"{source}.{name}", seen)) is not None), None)

    def named(self, node: ast.expr, of: Definition) -> str:
        """The dotted path of a name in a module."""
        first, _, rest = ast.unparse(node).partition(".")
        source = self.module(of.module).get(first)
        if not isinstance(source, str):
            return f"{of.module}.{first}{rest and '.'}{rest}"
        return f"{source}{rest and '.'}{rest}"

    def arguments(self, of: Definition, depth: int = 0) -> list[str]:
        """The names of what a definition takes; `*` at the end where any is."""
        node = of.node
        if depth > MOST_CALLS:
            return ["*"]
        if isinstance(node, ast.ClassDef):
            return self._of_class(node, of, depth)
        if isinstance(node, ast.FunctionDef):
            return self._of_function(node, of, depth)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("partial") and node.args:
            inner = self.find(self.named(node.args[0], of))
            return ["*"] if inner is None else self.arguments(inner, depth + 1)
        if isinstance(node, (ast.Name, ast.Attribute)):
            inner = self.find(self.named(node, of))
            return ["*"] if inner is None else self.arguments(inner, depth + 1)
        return []

    def _of_class(self, node: ast.ClassDef, of: Definition, depth: int) -> list[str]:
        made_by = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
        if made_by is not None:
            return self._of_function(made_by, of, depth, node)
        fields = [each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]
        is_dataclass = any("dataclass" in ast.unparse(each) for each in node.decorator_list)
        inherited: list[str] = []
        for base in node.bases:
            if (above := self.find(self.named(base, of))) is not None:
                inherited += self.arguments(above, depth + 1)
        return list(dict.fromkeys([*(fields if is_dataclass else ()), *inherited]))

    def _of_function(self, node: ast.FunctionDef, of: Definition, depth: int, cls: ast.ClassDef | None = None) -> list[str]:
        own = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        own = [name for name in own if name not in ("self", "cls")]
        if node.args.kwarg is None:
            return own
        passed_on: list[str] = []
        for call in (each for each in ast.walk(node) if isinstance(each, ast.Call)):
            if any(each.arg is None and ast.unparse(each.value) == node.args.kwarg.arg for each in call.keywords):
                names = [name for called in self._called(call.func, of, cls) for name in self._passed_to(called, depth)]
                passed_on += [name for name in names if name not in {each.arg for each in call.keywords}]
        rest = dict.fromkeys(passed_on or [ANY])
        return list(dict.fromkeys([*own, *sorted(rest, key=lambda name: name.startswith(ANY))]))

    def _passed_to(self, called: str, depth: int) -> list[str]:
        if called.endswith(f".{BUILDERS.rpartition('.')[2]}"):
            return [f"**{BUILDERS}"]
        inner = self.find(called)
        return [ANY] if inner is None else self.arguments(inner, depth + 1)

    def _called(self, func: ast.expr, of: Definition, cls: ast.ClassDef | None) -> list[str]:
        if ast.unparse(func) == "super().__init__" and cls is not None:
            return [self.named(base, of) for base in cls.bases]
        return [self.named(func, of)]

    def of_builders(self) -> list[str]:
        """The fields of the configs of `datasets`' own builders."""
        paths = [path for folder in self.folders for path in sorted(folder.glob("datasets/packaged_modules/*/*.py"))]
        trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
        classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
        classes = [node for node in classes if node.name.endswith("Config")]
        fields = [each.target for node in classes for each in node.body if isinstance(each, ast.AnnAssign)]
        return sorted({field.id for field in fields if isinstance(field, ast.Name)})

    def modules(self, package: str) -> Iterator[str]:
        """All modules of a package."""
        root = self.file(package)
        for path in sorted(root.parent.glob("**/*.py")) if root is not None else ():
            parts = path.relative_to(root.parent.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def components(self, package: str, patterns: tuple[str, ...]) -> dict[str, list[str]]:
        """Dotted path → file with line, and its arguments."""
        names = {pattern for pattern in patterns if "*" not in pattern}
        for module in self.modules(package):
            defined = self.module(module)
            if "._" not in module:
                public = [name for name in defined if not name.startswith(("_", "* "))]
                if not self.is_package(module):  # what it imports has its own path
                    exported = ast.unparse(node) if isinstance(node := defined.get("__all__"), ast.expr) else ""
                    public = [name for name in public if not isinstance(defined[name], str) or f"'{name}'" in exported]
                paths = [f"{module}.{name}" for name in public]
                names |= {path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns)}
        rows = {name: row for name in sorted(names) if (row := self.row(name)) is not None}
        for name, replaced in self.aliases(package).items():
            (at, own), (_, fields) = rows.get(name) or self.row(name) or ["", ""], self.row(replaced) or ["", ""]
            rows[name] = [at, " ".join(dict.fromkeys([*own.replace(ANY, "").split(), *fields.split()]))]
        (at, arguments) = self.row(BUILDERS) or ("", "")
        own = [name for name in arguments.split() if name != ANY]
        return {**rows, BUILDERS: [at, " ".join(dict.fromkeys([*own, *self.of_builders()]))]}

    def aliases(self, package: str) -> dict[str, str]:
        """Component → the class whose fields replace its arguments."""
        pairs: dict[str, str] = {}
        for names in map(self.module, self.modules(package)):
            if isinstance(mapping := names.get(ALIASES), ast.Dict):
                keys = (key for key in mapping.keys if key is not None)
                pairs |= {_text(key, names): _text(value, names) for key, value in zip(keys, mapping.values, strict=True)}
        return pairs

    def is_package(self, module: str) -> bool:
        """Whether a module is the `__init__` of a folder."""
        path = self.file(module)
        return path is not None and path.name == "__init__.py"

    def row(self, name: str) -> list[str] | None:
        """File with line, and arguments between spaces; None for what nobody can call."""
        of = self.find(name)
        module, _, last = name.rpartition(".")
        if of is None and last in self.module(module):  # of a package that is not here
            return [module.replace(".", "/"), ANY]
        if of is None or not isinstance(of.node, (ast.FunctionDef, ast.ClassDef, ast.Call, ast.Name, ast.Attribute)):
            return None
        path = self.file(of.module)
        below = next(path.relative_to(folder) for folder in self.folders if path is not None and path.is_relative_to(folder))
        return [f"{below}:{of.node.lineno}", " ".join(self.arguments(of))]


def of_peft(sources: Sources) -> dict[str, list[str]]:
    """peft's name of a method, in capitals → the fields of its config."""
    rows = {}
    for module in sources.modules("peft.tuners"):
        for name, node in sources.module(f"peft.{module}").items():
            if isinstance(node, ast.ClassDef) and (row := sources.row(f"peft.{module}.{name}")) is not None:
                assigned = [each for each in ast.walk(node) if isinstance(each, ast.Assign)]
                types = [each.value for each in assigned if ast.unparse(each.targets[0]) == "self.peft_type"]
                rows |= {each.attr: row for each in types if isinstance(each, ast.Attribute)}
    return rows


def _text(node: ast.expr, names: dict[str, ast.AST | str]) -> str:
    """A literal, in which names of the module stand for literals."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    values = [names[ast.unparse(part.value)] if isinstance(part, ast.FormattedValue) else part for part in parts]
    return "".join(str(value.value) for value in values if isinstance(value, ast.Constant))


def main(tool: str, libraries: str, *folders: str) -> None:
    """Write the components of a tool."""
    path = FOLDER / f"{tool}.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    package, patterns = COMPONENTS.get(tool, (tool, ()))
    rows: dict[str, list[str]] = {}
    for release, folder in (each.split("=", 1) for each in folders):
        of = "" if release == facts["version"] else f"{tool} {release}, "
        sources = Sources([Path(folder), Path(libraries)])
        read = of_peft(sources) if tool == "peft" else sources.components(package, patterns)
        for name, (at, arguments) in read.items():
            before = rows.get(name, [f"{of}{at}", ""])
            rows[name] = [before[0], " ".join(dict.fromkeys([*before[1].split(), *arguments.split()]))]
    facts["components"] = dict(sorted(rows.items()))
    path.write_text(written(facts), encoding="utf-8")
    print(f"{tool}: {len(rows)} components")


if __name__ == "__main__":
    main(*sys.argv[1:])
