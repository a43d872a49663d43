"""Which tests are `quick`: those outside tests/trace and tests/libraries that need none of the libraries of the extra `trace`."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

NEED_STACK = {Path(__file__).parent / room for room in ("libraries", "trace")}
STACK = r"(?:torch|transformers|peft|bitsandbytes|accelerate|trl)\b"
NEEDS_STACK = re.compile(rf"importorskip\((?:[\"']{STACK}|[A-Za-z])|^\s*(?:import|from) {STACK}", re.M)
"""Code that imports torch or a library on top of it, or skips without; a name instead of a string stands for one of them."""
STACK_FIXTURES = frozenset({"real_states"})
"""Fixtures that need these libraries; the tests that use them do not say so themselves."""


@cache
def module_needs_stack(path: Path) -> bool:
    """Whether all of a file needs these libraries: it lies in their rooms, or code outside functions and classes says so."""
    if not NEED_STACK.isdisjoint(path.parents):
        return True
    source = path.read_text(encoding="utf-8")
    statements = [node for node in ast.parse(source).body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    lines = source.splitlines()
    return any(NEEDS_STACK.search("\n".join(lines[node.lineno - 1 : node.end_lineno])) for node in statements)


def is_quick(item: pytest.Function) -> bool:
    """Whether a test is marked `quick`."""
    if module_needs_stack(item.path) or not STACK_FIXTURES.isdisjoint(item.fixturenames):
        return False
    return not NEEDS_STACK.search(inspect.getsource(item.function))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m quick` does not even import a file that needs these libraries: torch alone takes seconds."""
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if config.option.markexpr == "quick" and is_test and module_needs_stack(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every quick test, before `-m` selects."""
    for item in items:
        if isinstance(item, pytest.Function) and is_quick(item):
            item.add_marker(pytest.mark.quick)
