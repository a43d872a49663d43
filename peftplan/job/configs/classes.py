"""Classes of a program: the fields of their objects, and what they change of a library's trainer."""

from __future__ import annotations

import ast

from peftplan.job.configs.functions import fields_written_by, of_field
from peftplan.job.configs.instances import Instance
from peftplan.job.configs.order import trains
from peftplan.job.configs.weights import Weights

_NAMES = """
    log evaluate evaluation_loop prediction_step prediction_loop predict save_model _save _save_checkpoint push_to_hub
    create_scheduler get_eval_dataloader get_test_dataloader compute_metrics _maybe_log_save_evaluate"""
WITHOUT_EFFECT = frozenset(_NAMES.split())
"""Methods of a trainer that take no part in a step."""


class Classes(Weights):
    """Records the fields of classes, and which methods a trainer of the program has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.overrides: dict[str, set[str]] = {}
        """Trainer of the program → its own methods that may change what a step holds."""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """The fields of a class, as attributes of whatever is made of it; a trainer's is its library's with other methods."""
        trainer = next((name for name in map(self.name_of, node.bases) if trains(name)), None)
        if trainer is not None:
            self._rename(node.name, trainer)
            methods = {each.name for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))}
            of_base = next((self.overrides[name] for name in map(ast.unparse, node.bases) if name in self.overrides), set())
            self.overrides[node.name] = of_base | (methods - WITHOUT_EFFECT)
            self.generic_visit(node)
            return
        fields = Instance()
        for base in node.bases:
            fields |= self.fields.get(ast.unparse(base), {})
        for statement in node.body:
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                field, default = statement.targets[0], statement.value
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                field, default = statement.target, statement.value
            else:
                self.visit(statement)
                continue
            self.visit(default)
            if isinstance(field, ast.Name):
                fields[field.id] = self._inside(of_field(default))
                self._field(field.id, fields[field.id], f"class {node.name}")
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__post_init__", "__new__"):
                any_field = None in fields_written_by(method, "self")
                fields |= {field: f"<{field}>" for field in fields if any_field or f".{field}" in self._bound(method)}
        self.fields[node.name] = fields
        self.names.pop(node.name, None)
