"""Refresh what `data/configs/*.json` copies from the tools' own sources: every key of a tool with its default, file and line.

    python -m tools.config_schemas FOLDER

FOLDER holds the unpacked packages that `READ` names (`pip download --no-deps` and unzip). They are parsed, never imported. What a
key means for memory is written by hand in the same files, and stays.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftplan.datafiles import DATA

FOLDER = DATA / "configs"
READ: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "axolotl": (
        "axolotl",
        {
            "utils/schemas/*.py": ("*",),
            "integrations/*/args.py": ("*",),
        },
    ),
    "llamafactory": ("llamafactory", {"hparams/*.py": ("*",)}),
    "llamafactory-v1": ("llamafactory", {"v1/config/*.py": ("*",)}),
    "trl": ("trl", {"trainer/*_config.py": ("*",), "scripts/utils.py": ("ScriptArguments", "DatasetMixtureConfig")}),
    "swift": ("swift", {"arguments/**/*.py": ("*",), "trainers/arguments.py": ("*",), "rlhf_trainers/arg*.py": ("*",)}),
    "transformers": ("transformers", {"training_args.py": ("TrainingArguments",)}),
    "peft": (
        "peft",
        {"config.py": ("PeftConfigMixin", "PeftConfig"), "tuners/lora/config.py": ("*",), "tuners/*/config.py": ("*",)},
    ),
    "unsloth": (
        "unsloth",
        {
            "models/loader.py": ("from_pretrained",),
            "models/llama.py": ("get_peft_model",),
            "models/vision.py": ("get_peft_model",),
        },
    ),
}  # fmt: skip
"""Tool → its package, and there file → classes whose fields are keys, or functions whose arguments are."""
PREFIXES = {"from_pretrained": "load.", "get_peft_model": "lora."}
"""Functions whose arguments are keys → what stands before them."""


def fields(tree: ast.Module, names: tuple[str, ...]) -> Iterator[tuple[str, int, Any]]:
    """Key, line and default of the fields of classes and the arguments of functions with these names (`*`: all classes)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and ("*" in names or node.name in names):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    yield statement.target.id, statement.lineno, default_of(statement.value)
        elif isinstance(node, ast.FunctionDef) and node.name in names:
            arguments = [*node.args.posonlyargs, *node.args.args]
            defaults = [None] * (len(arguments) - len(node.args.defaults)) + list(node.args.defaults)
            for argument, value in zip(arguments, defaults, strict=True):
                if argument.arg not in ("self", "model"):
                    yield PREFIXES.get(node.name, "") + argument.arg, argument.lineno, default_of(value)


def default_of(value: ast.expr | None) -> Any:
    """The default as JSON; None where it is computed."""
    if isinstance(value, ast.Call):
        keywords = {keyword.arg: keyword.value for keyword in value.keywords}
        value = keywords.get("default", value.args[0] if value.args and "Field" in ast.unparse(value.func) else None)
    try:
        literal = ast.literal_eval(value) if value is not None else None
        json.dumps(literal)
    except (ValueError, TypeError):
        return None
    return None if literal is ... else literal


def schema(package: Path, files: dict[str, tuple[str, ...]]) -> dict[str, list[Any]]:
    """Key → default, and file:line below the package. The first of two definitions holds."""
    keys: dict[str, list[Any]] = {}
    for pattern, names in files.items():
        for path in sorted(package.glob(pattern)):
            for key, line, default in fields(ast.parse(path.read_text(encoding="utf-8")), names):
                keys.setdefault(key, [default, f"{path.relative_to(package)}:{line}"])
    return dict(sorted(keys.items()))


def main(unpacked: Path) -> None:
    """Write the schemas of the tools whose packages are there."""
    for tool, (name, files) in READ.items():
        path = FOLDER / f"{tool}.json"
        package = next(unpacked.glob(f"**/{name}/__init__.py"), None)
        if not path.exists() or package is None:
            print(f"{tool}: left as it is")
            continue
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts["schema"] = schema(package.parent, files)
        path.write_text(written(facts), encoding="utf-8")
        print(f"{tool}: {len(facts['schema'])} keys")


def written(facts: dict[str, Any]) -> str:
    """The file: a row per line."""

    def rows(value: Any) -> str:
        if isinstance(value, dict):
            return (
                "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()) + "\n }"
            )
        if isinstance(value, list):
            return "[\n" + ",\n".join(f"  {json.dumps(v, ensure_ascii=False)}" for v in value) + "\n ]"
        return json.dumps(value, ensure_ascii=False)

    return "{\n" + ",\n".join(f" {json.dumps(k)}: {rows(v)}" for k, v in facts.items()) + "\n}\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
