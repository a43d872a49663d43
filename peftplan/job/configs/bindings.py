"""Which names a part of a program binds, and what several paths through it agree on."""

from __future__ import annotations

import ast

from peftplan.job.configs.instances import UNKNOWN, one_of

MUTATORS = (
    "append",
    "extend",
    "insert",
    "remove",
    "pop",
    "clear",
    "update",
    "popitem",
    "sort",
    "reverse",
    "add",
    "discard",
    "__setitem__",
)
"""Methods that change a list, a dictionary or a set."""


def own_names(node: ast.AST) -> set[str]:
    """The names that one node binds itself, and the attributes (`.name`)."""
    if isinstance(node, (ast.Name, ast.Attribute)):
        if isinstance(node.ctx, ast.Load):
            return set()
        return {node.id if isinstance(node, ast.Name) else f".{node.attr}"}
    if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
        return {node.name or ""}
    if isinstance(node, ast.MatchMapping):
        return {node.rest or ""}
    if isinstance(node, ast.alias):
        return {node.asname or node.name.partition(".")[0]}
    if isinstance(node, ast.arg):
        return {node.arg}
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        return roots(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in (*MUTATORS, "setdefault"):
        return roots(node.func.value)
    return set()


def roots(node: ast.expr) -> set[str]:
    while isinstance(node, ast.Subscript):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else {f".{node.attr}"} if isinstance(node, ast.Attribute) else set()


def common(ends: list[dict[str, tuple[object, frozenset[str]]]]) -> dict[str, tuple[object, frozenset[str]]]:
    """What the ends of all paths agree on."""
    first, *others = ends
    common = {}
    for name, (_, options) in first.items():
        if all(name in end for end in others):
            value = one_of([end[name][0] for end in ends])
            if value is not UNKNOWN:
                common[name] = (value, options.union(*(end[name][1] for end in others)))
    return common


def leaves(last: ast.AST) -> bool:
    """Whether a path leaves the program or function here."""
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
        return ast.unparse(last.value.func) in ("exit", "quit", "sys.exit", "os._exit")
    return isinstance(last, (ast.Raise, ast.Return))
