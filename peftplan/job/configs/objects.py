"""Objects of a program: which call made a library's object, and what the program writes to its fields afterwards."""

from __future__ import annotations

import ast
from typing import cast

from peftplan.job.configs.assignments import Assignments
from peftplan.job.configs.bindings import MUTATORS
from peftplan.job.configs.documents import Call, Values
from peftplan.job.configs.functions import Function, Functions, changes, fields_written_by, grown_outside
from peftplan.job.configs.instances import Instance, plain
from peftplan.job.configs.order import trains

OF_MODEL = "AutoConfig.from_pretrained"
"""The end of the name of a call that makes the config of a model."""
OF_SETTINGS = ("Config", "Arguments", OF_MODEL)
"""Endings of the names of calls that make settings."""
CHANGING = ("update", "setattr")
"""Beginnings of the names of methods and functions that change settings; `set_` is another."""
COPIES = ("copy.copy", "copy.deepcopy", "deepcopy", "replace", "dataclasses.replace")
"""Functions that make another object of one, `replace` with other fields."""
UNSEEN = "<keyword arguments>"
"""The value at `**` if the text does not show all fields that are set."""


class Objects(Assignments):
    """Records what is written to the settings of a trainer or an adapter before the first trainer is made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.nodes: dict[int, ast.Call] = {}
        """Identity of a call → its syntax node."""
        self.fields: dict[str, Values] = {}
        """Class of the program → its fields' defaults."""
        self.functions: Functions = {}
        """Functions of the program by their names."""
        self.constructors: dict[str, Function] = {}
        """Class of the program → its `__init__`."""

    def _note_written(self, target: ast.Attribute, value: object) -> None:
        """A field of a class, or of settings."""
        owner = ast.unparse(target.value)[:200]
        if target.attr in self.fields.get(owner, {}):
            self.fields[owner] = Instance({**self.fields[owner], target.attr: f"<{target.attr}>"})
        written_to = self.names.get(owner)
        if isinstance(written_to, Instance):
            known = not (self.unsure or written_to.is_copy) and (plain(value) or isinstance(value, str))
            self._give(written_to, target.attr, value if known else f"<{target.attr}>")
        self._note_inside(target.value)

    def _note_inside(self, part: ast.expr) -> None:
        """A write to a part of a model's config, such as `config.text_config.vocab_size = 8`."""
        text = ast.unparse(part)[:200]
        of = self.names.get(text.partition(".")[0]) if "." in text else None
        if isinstance(of, Instance) and any(self.name_of(each.func).endswith(OF_MODEL) for each in of.made_by):
            field = text.split(".")[1].partition("[")[0]
            self._give(of, field, f"<{field}>")

    def _give(self, owner: Instance, field: str, value: object) -> None:
        """Set a field in the calls that made the settings."""
        if not self.taken or not owner.made_by or any(trains(call["call"]) for call in self.calls):
            return
        for call in self.calls:
            if self.nodes[id(call)] in owner.made_by and call["call"].endswith(OF_SETTINGS):
                call["kwargs"][field] = value

    def _note_unseen(self, changed: ast.expr) -> None:
        """Settings that change in a way that the text does not show. No field of the program's own object is known any more."""
        value = self.value_of_object(changed)
        if value is None:
            return
        if value.made_by:
            self._give(value, "**", UNSEEN)
        elif isinstance(changed, ast.Name):
            self.names[changed.id] = Instance({field: f"<{field}>" for field in value})

    def _note_changes(self, name: str, node: ast.Call) -> None:
        """What a call changes: `setattr`, `vars(x).update`, a method of settings, `dataclasses.replace`."""
        last = name.rpartition(".")[2]
        if last in ("setattr", "__setattr__") and len(node.args) == 3:
            attribute = self.value(node.args[1])
            if isinstance(attribute, str) and plain(attribute):
                self._write(ast.Attribute(node.args[0], attribute, ast.Store()), self.value(node.args[2]))
            else:
                self._note_unseen(node.args[0])
        elif name in COPIES and node.args and (of := self.value_of_object(node.args[0])) is not None:
            for keyword in node.keywords:
                self._give(of, keyword.arg or "**", f"<{keyword.arg}>" if keyword.arg else UNSEEN)
        elif isinstance(node.func, ast.Attribute) and (last in CHANGING or last.startswith("set_")):
            self._note_unseen(node.func.value)

    def value_of_object(self, node: ast.expr) -> Instance | None:
        """The object behind an expression."""
        value = self.value(node) if isinstance(node, (ast.Name, ast.Call, ast.Attribute)) else None
        return value if isinstance(value, Instance) else None

    def _changed_by(self, function: Function, argument: ast.expr, parameter: str | None) -> None:
        """What a function of the program writes to the fields or items of its argument."""
        value = self.names.get(argument.id) if isinstance(argument, ast.Name) else None
        if isinstance(value, Instance) and value.made_by:
            for field in fields_written_by(function, parameter) if parameter else ():
                self._give(value, field or "**", f"<{field}>" if field else UNSEEN)
        elif isinstance(value, Instance):
            written = {field: f"<{field}>" for field in value if f".{field}" in self._bound(function)}
            if written:
                self.names[cast("ast.Name", argument).id] = value.with_fields(written)
        elif isinstance(value, (list, dict)) and (parameter is None or changes(function, parameter, self.functions)):
            self._changed(argument)

    def _note_changed(self, called: Function, node: ast.Call) -> tuple[list[str], list[str]]:
        """What a function of the program changes; its parameters, and those that a call's arguments are for."""
        for outside in grown_outside(called, MUTATORS):
            self._forget(outside)
        positional = [each.arg for each in (*called.args.posonlyargs, *called.args.args)]
        named = positional[1:] if positional[:1] in (["self"], ["cls"]) else positional
        for argument, parameter in [
            *zip(node.args, [*named, *[None] * len(node.args)], strict=False),
            *((keyword.value, keyword.arg) for keyword in node.keywords),
            *([(node.func.value, positional[0])] if isinstance(node.func, ast.Attribute) and named != positional else []),
        ]:
            for each in [argument.value] if isinstance(argument, ast.Starred) else [argument]:
                for one in each.elts if isinstance(each, (ast.List, ast.Tuple)) else [each]:
                    self._changed_by(called, one, None if isinstance(argument, ast.Starred) else parameter)
        return positional, named
