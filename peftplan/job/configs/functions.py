"""Functions of a program: their parameters, and who may call them; nothing runs."""

from __future__ import annotations

import ast

Functions = dict[str, ast.FunctionDef | ast.AsyncFunctionDef | None]
"""Functions of a program by their names; None where a name is that of several."""


def functions_of(nodes: list[ast.AST]) -> Functions:
    """All functions among the nodes."""
    functions: Functions = {}
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            functions[node.name] = None if node.name in functions else node
    return functions


def passed(nodes: list[ast.AST], functions: Functions) -> set[str]:
    """Functions that something else may call: decorated ones, and those whose names stand elsewhere than before arguments."""
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    names = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and id(node) not in called}
    return {name for name, node in functions.items() if name in names or (node is not None and node.decorator_list)}


def unmentioned(nodes: list[ast.AST], statements: list[ast.stmt]) -> set[str]:
    """Functions of a module whose names stand nowhere in it, and that no decorator takes."""
    names = {node.id for node in nodes if isinstance(node, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    functions = [each for each in statements if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {each.name for each in functions if each.name not in names and not each.decorator_list}


def bound_elsewhere(nodes: list[ast.AST]) -> set[str]:
    """Names that a function binds outside itself, at a time that the text does not tell."""
    return {name for node in nodes if isinstance(node, (ast.Global, ast.Nonlocal)) for name in node.names}


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of all parameters."""
    each = node.args
    rest = [one for one in (each.vararg, each.kwarg) if one]
    return [one.arg for one in (*each.posonlyargs, *each.args, *each.kwonlyargs, *rest)]


def default_values(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, ast.expr]:
    """Parameter → the expression that stands for it where a call leaves it out."""
    positional = [*node.args.posonlyargs, *node.args.args]
    pairs = [*zip(positional[len(positional) - len(node.args.defaults) :], node.args.defaults, strict=True)]
    pairs += [(each, value) for each, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if value]
    return {each.arg: value for each, value in pairs}


def of_field(value: ast.expr) -> ast.expr:
    """The default of `field(default=…)` and `field(default_factory=lambda: …)`; other values themselves."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
        for keyword in value.keywords:
            if keyword.arg == "default":
                return keyword.value
            if keyword.arg == "default_factory" and isinstance(keyword.value, ast.Lambda):
                return keyword.value.body
    return value
