"""Notebooks saved as scripts: marimo's cells are functions, and Jupyter's export calls IPython for magics and the shell."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

EXPORTED = re.compile(r"^(?:# )?(\s*)get_ipython\(\)\.(system|run_line_magic|run_cell_magic)\((.*)\)\s*$", re.MULTILINE)
"""What `jupyter nbconvert --to script` writes of a line for IPython. Whole cells may be behind `# `."""
PYTHON = ("capture", "time")
"""Magics of cells whose lines are Python."""
METADATA = re.compile(r"^# /// script\s*$\n(.*?)^# ///\s*$", re.MULTILINE | re.DOTALL)
"""A script's own metadata (PEP 723)."""
DEPENDENCIES = re.compile(r"^dependencies\s*=\s*\[(.*?)^\s*\]", re.MULTILINE | re.DOTALL)
STRING = re.compile(r"\"([^\"\n]*)\"|'([^'\n]*)'")


def magics_of(text: str) -> list[str]:
    """The lines for the shell and for IPython, and cells behind a magic, as the exported notebook has them."""
    return [indent + source for indent, call, words in EXPORTED.findall(text) if (source := _source(call, words)) is not None]


def _source(call: str, words: str) -> str | None:
    """What a call of IPython stands for; None for cells in another language."""
    try:
        arguments = ast.literal_eval(f"({words},)")
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    if not all(isinstance(each, str) for each in arguments):
        return None
    if call == "run_cell_magic":
        return arguments[-1] if arguments[0] in PYTHON else None
    return f"!{arguments[0]}" if call == "system" else f"%{' '.join(arguments)}"


def dependencies(text: str) -> Iterator[str]:
    """The requirements that a script names for the program that starts it (PEP 723): `transformers==4.56.2`."""
    if (block := METADATA.search(text)) is None:
        return
    toml = re.sub(r"^# ?", "", block[1], flags=re.MULTILINE)
    if (named := DEPENDENCIES.search(toml)) is not None:
        yield from (first or second for first, second in STRING.findall(named[1]))


def without_cells(statements: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of a marimo notebook, with those of each cell that runs in place of its function."""
    joined: list[ast.stmt] = []
    for each in statements:
        cell = _cell(each)
        if cell is None:
            joined.append(each)
        elif not _is_disabled(cell):
            joined += [inner for inner in getattr(each, "body", ()) if not isinstance(inner, ast.Return)]
    return joined


def _cell(node: ast.stmt) -> ast.expr | None:
    """The `@app.cell` of a function, and the `app.setup` of a block."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return next((each for each in node.decorator_list if _called(each) == "app.cell"), None)
    return (
        node.items[0].context_expr if isinstance(node, ast.With) and _called(node.items[0].context_expr) == "app.setup" else None
    )


def _called(node: ast.expr) -> str:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def _is_disabled(cell: ast.expr) -> bool:
    keywords = cell.keywords if isinstance(cell, ast.Call) else []
    return any(each.arg == "disabled" and isinstance(each.value, ast.Constant) and each.value.value is True for each in keywords)
