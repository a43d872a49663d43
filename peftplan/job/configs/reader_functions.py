"""What a function of the program returns for one call, if all that it does is open files and pick values; nothing runs."""

from __future__ import annotations

import ast

from peftplan.job.configs.data_files import DataFiles
from peftplan.job.configs.functions import Function, default_values, parameters
from peftplan.job.configs.instances import UNKNOWN, Instance, plain

MOST_INSIDE = 3
"""Levels of functions that call each other."""
SPEAKING = ("print", "logger.", "logging.", "log.")
"""Beginnings of the names of functions that write to a screen or a log."""


class ReaderFunctions(DataFiles):
    """Follows a call into a function such as `def load(path): with open(path) as f: return yaml.safe_load(f)`."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        """How many functions are being followed."""

    def of_one_call(self, function: Function, node: ast.Call) -> object:
        """What a function returns for a call; UNKNOWN where it does more, or takes more than its parameters."""
        arguments = self._arguments_of(function, node)
        own = {each.id for each in ast.walk(function) if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load)}
        others = {each.id for each in ast.walk(function) if isinstance(each, ast.Name)} - own - {*parameters(function)}
        is_own = all(name.isupper() for name in others if name in self.names)
        if arguments is None or function.decorator_list or self.inside >= MOST_INSIDE or not is_own:
            return UNKNOWN
        before, self.names = self.names, {**{name: self.names[name] for name in others if name in self.names}, **arguments}
        self.inside += 1
        try:
            value = self._result(function.body)
        finally:
            self.names, self.inside = before, self.inside - 1
        return value if isinstance(value, dict) and not (isinstance(value, Instance) and value.made_by) else UNKNOWN

    def _arguments_of(self, function: Function, node: ast.Call) -> dict[str, object] | None:
        """Parameter → what a call gives it; None where the text does not tell."""
        names = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
        names = names[1:] if names[:1] in (["self"], ["cls"]) else names
        expressions = {**default_values(function), **dict(zip(names, node.args, strict=False))}
        spread = any(isinstance(each, ast.Starred) for each in node.args) or any(each.arg is None for each in node.keywords)
        expressions |= {str(each.arg): each.value for each in node.keywords}
        if spread or len(node.args) > len(names) or not expressions.keys() <= {*parameters(function)}:
            return None
        values = {name: self.value(each) for name, each in expressions.items()}
        return {name: value for name, value in values.items() if plain(value) or isinstance(value, dict)}

    def _result(self, body: list[ast.stmt]) -> object:
        """What a block returns; None where it goes on behind it."""
        for each in body:
            result = self._step(each)
            if result is not None:
                return result
        return None

    def _step(self, node: ast.stmt) -> object:
        """What a statement returns: None where it goes on, UNKNOWN where it does anything else than bind a name."""
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Pass)) or (isinstance(node, ast.Expr) and _is_silent(node.value)):
            return None
        if isinstance(node, ast.Return):
            return UNKNOWN if node.value is None else self.value(node.value)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if len(targets) != 1 or not isinstance(targets[0], ast.Name):
                return UNKNOWN
            self._keep(targets[0].id, self.value(node.value))
            return None
        if isinstance(node, ast.With):
            for item in node.items:
                self.visit_withitem(item)
            return self._result(node.body)
        if isinstance(node, ast.Try) and not (node.orelse or node.finalbody):
            raises = all(isinstance(each.body[-1], ast.Raise) for each in node.handlers)
            return self._result(node.body) if raises else UNKNOWN
        if isinstance(node, ast.If):
            holds = self._truth(node.test)
            if holds is None and isinstance(node.body[-1], ast.Raise):
                holds = False  # a program that raises trains nothing
            return UNKNOWN if holds is None else self._result(node.body if holds else node.orelse)
        return UNKNOWN


def _is_silent(node: ast.expr) -> bool:
    """Whether an expression documents, or is written to a screen or a log."""
    is_call = isinstance(node, ast.Call) and ast.unparse(node.func).startswith(SPEAKING)
    return isinstance(node, ast.Constant) or is_call
