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
OF_A_STEP = frozenset({"compute_loss", "training_step", "create_optimizer", "optimizer", "model"})
"""Attributes of a trainer that decide what a step holds."""
EVERY = ""
"""What stands for all trainers of the program."""


class Classes(Weights):
    """Records the fields of classes, and which methods a trainer of the program has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.overrides: dict[str, set[str]] = {}
        """Trainer of the program → its own methods that may change what a step holds."""
        self.methods: dict[str, set[str]] = {}
        """Another class of the program → its methods."""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """The fields of a class, as attributes of whatever is made of it; a trainer's is its library's with other methods."""
        trainer = next((name for name in map(self.name_of, node.bases) if trains(name)), None)
        if trainer is not None:
            self._rename(node.name, trainer)
            self.overrides[node.name] = self._methods_of(node) - WITHOUT_EFFECT
            self.generic_visit(node)
            return
        self.methods[node.name] = self._methods_of(node)
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
                self._field(field.id, self.field_value(field.id, fields[field.id]), f"class {node.name}")
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__post_init__", "__new__"):
                any_field = None in fields_written_by(method, "self")
                fields |= {field: f"<{field}>" for field in fields if any_field or f".{field}" in self._bound(method)}
        self.fields[node.name] = fields
        self.names.pop(node.name, None)

    def field_value(self, field: str, default: object) -> object:
        """What a field of a class holds in objects that the program does not make itself."""
        return default

    def _methods_of(self, node: ast.ClassDef) -> set[str]:
        """A class's methods, inherited ones of the program's own classes included: `def f`, or `f = g`."""
        defined = {each.name for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))}
        named = [each for each in node.body if isinstance(each, ast.Assign) and isinstance(each.value, (ast.Name, ast.Lambda))]
        defined |= {target.id for each in named for target in each.targets if isinstance(target, ast.Name)}
        bases = map(ast.unparse, node.bases)
        return defined.union(*(self.overrides.get(base) or self.methods.get(base, set()) for base in bases))

    def _note_written(self, target: ast.Attribute, value: object) -> None:
        """What else a program puts in the place of a trainer's own: `trainer.compute_loss = f`, `Trainer.compute_loss = f`."""
        super()._note_written(target, value)
        of = self.value_of_object(target.value)
        of_trainer = of is not None and any(trains(self.name_of(each.func)) for each in of.made_by)
        counts = self.taken and target.attr in OF_A_STEP and self._here() not in self.done
        if counts and (of_trainer or trains(self.name_of(target.value))):
            self.overrides.setdefault(EVERY, set()).add(target.attr)
