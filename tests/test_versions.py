"""Thresholds of the libraries' releases stand in one file, each with what changed and where."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import peftplan
from peftplan import versions
from peftplan.job.configs.facts import facts
from peftplan.versions import Change

PACKAGE = Path(peftplan.__file__).parent
CHANGES = {name: value for name, value in vars(versions).items() if isinstance(value, Change)}
VERSION = re.compile(r"^(torch|transformers|peft|trl|accelerate|bitsandbytes)? ?\d+\.\d+(\.\d+)?\.?$")
"""What nothing but a version is: `5.0.`, `transformers 5.24`."""


def compared(tree: ast.AST) -> list[int]:
    """Lines that compare with a string that is a version, or ask whether a version begins with it."""
    lines = []
    for node in ast.walk(tree):
        texts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            texts = [*node.args]
        lines += [n.lineno for n in texts if isinstance(n, ast.Constant) and isinstance(n.value, str) and VERSION.match(n.value)]
    return lines


def test_no_other_file_compares_a_version() -> None:
    assert [
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for line in compared(ast.parse(file.read_text(encoding="utf-8")))
    ] == []
    assert compared(ast.parse("version('transformers').startswith('5.0.')")) == [1]


TOLD = ("versions.py", "report/accuracy_text.py")
"""Files that may name a release: the one place, and the text about runs that were measured with others."""
READ = re.compile(rf"(?<![\w-])({'|'.join(versions.READ_IN)})(?:['’]s)? \d+\.\d+")


def named(text: str) -> list[str]:
    """Releases of libraries that a file names, in docstrings, comments and messages."""
    return [match.group() for match in READ.finditer(text)]


def test_no_other_file_names_a_release() -> None:
    files = (file for file in sorted(PACKAGE.rglob("*.py")) if file.relative_to(PACKAGE).as_posix() not in TOLD)
    assert {file.name: text for file in files if (text := named(file.read_text(encoding="utf-8")))} == {}
    assert named("peft's 0.21 and torch 2.13's tools") == ["peft's 0.21", "torch 2.13"]
    assert named("galore-torch 1.0, without torch 2") == ["galore-torch 1.0"]


def test_a_change_says_its_release_and_the_one_before() -> None:
    assert (versions.QUANTIZING_IN_TURN.named, versions.QUANTIZING_IN_TURN.before) == ("transformers 5.4", "5.3")
    assert versions.named("peft") == f"peft {versions.READ_IN['peft']}"


def test_each_change_names_its_package_and_where_it_shows() -> None:
    assert len(CHANGES) >= 9
    releases = {**versions.READ_IN, "axolotl": facts("axolotl").version}  # a tool's is that of its data file
    assert all(change.package in releases and change.source for change in CHANGES.values())
    read_in = {package: tuple(map(int, release.split("."))) for package, release in releases.items()}
    assert all(change.release <= read_in[change.package] for change in CHANGES.values())


def test_a_change_is_to_come_before_its_release_alone() -> None:
    change = versions.ROTARY_WITHOUT_PRODUCT
    assert [change.after(version) for version in ("4.57.6", "5.18.1", "5.19.0", "6.0", None)] == [True, True, False, False, False]
