"""Assignments of a program: the values of its names, attributes and items, and the environment that it sets."""

from __future__ import annotations

import ast
from collections.abc import Collection

from peftplan.job.configs.documents import ALLOCATOR, Values
from peftplan.job.configs.flow import Flow
from peftplan.job.configs.instances import Instance, plain

SETTINGS = ("UNSLOTH_", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
"""How the environment variables begin that decide how a package trains."""


class Assignments(Flow):
    """Binds names as statements do."""

    def __init__(self) -> None:
        super().__init__()
        self.environment: Values = {}
        """Environment variables that the program sets, by name."""
        self.of_allocator: dict[str, str] = {}
        """Those of torch's allocator, likewise."""
        self.elsewhere: set[str] = set()
        """Global names that a function binds."""
        self.set_elsewhere: set[object] = set()
        """Keys that the program sets in dictionaries that this reading cannot identify."""

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """`rank *= 2`."""
        self.visit(node.value)
        target = node.target
        if isinstance(target, ast.Name):
            loaded: ast.expr = ast.Name(target.id, ast.Load())
        else:
            loaded = ast.parse(ast.unparse(target), mode="eval").body
        value = self.fresh(ast.BinOp(loaded, node.op, node.value))
        before = self.names.get(target.id) if isinstance(target, ast.Name) else None
        same = [name for name, other in self.names.items() if other is before] if isinstance(before, list) else []
        self.visit(node.target)
        for name in same:  # `+=` changes the list itself, whatever it is called
            self._keep(name, value if self.taken else f"<{name}>", self.by_default)
        self._bind(node.target, value, self.by_default)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        """`(rank := 8)`."""
        self.visit(node.value)
        self._bind(node.target, self.fresh(node.value), self.by_default)

    def visit_Assign(self, node: ast.Assign) -> None:
        """A name or an attribute for a plain value, or `os.environ["NAME"] = value`."""
        self.visit(node.value)
        pairs = []
        for target in node.targets:
            elements = target.elts if isinstance(target, (ast.Tuple, ast.List)) else []
            values = node.value.elts if isinstance(node.value, (ast.Tuple, ast.List)) else []
            if (
                elements
                and len(elements) == len(values)
                and not any(isinstance(each, ast.Starred) for each in (*elements, *values))
            ):
                pairs += [*zip(elements, values, strict=True)]
            elif elements and isinstance(node.value, ast.Call):
                value = self.value(node.value)
                pairs += [(each, node.value) for each in elements if isinstance(value, Instance)]
                if isinstance(value, list) and len(value) == len(elements):
                    each_of = (ast.Subscript(node.value, ast.Constant(index), ast.Load()) for index in range(len(value)))
                    pairs += [*zip(elements, each_of, strict=True)]
            elif not elements:
                pairs.append((target, node.value))
        bindings = [(target, value, self.fresh(value), self.by_default) for target, value in pairs]
        for target in node.targets:
            copies = (
                isinstance(target, ast.Attribute) and isinstance(node.value, ast.Attribute) and target.attr == node.value.attr
            )
            if not isinstance(target, ast.Subscript) and not copies:
                self.visit(target)
        for target, expression, value, options in bindings:
            if isinstance(target, ast.Subscript):
                self._set(target.value, target.slice, expression)
            else:
                self._bind(target, value, options)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """A name with its type."""
        if node.value is not None:
            self.visit_Assign(ast.Assign([node.target], node.value))

    def _bind(self, target: ast.expr, value: object, by_default: Collection[str]) -> None:
        if self.taken and isinstance(target, ast.Name) and isinstance(value, str):
            name = value[1:-1]
            if name.replace(".", "").isidentifier():
                self._rename(target.id, name if value == f"<{name}>" else "")
        if isinstance(target, ast.Name) and target.id not in self.elsewhere:
            self._keep(target.id, value, by_default)
        elif isinstance(target, ast.Attribute):
            self._write(target, value)

    def _set(self, mapping: ast.expr, key: ast.expr, value: ast.expr, *, absent: bool = False) -> None:
        """A variable of the environment that matters, or an item of a dictionary of the program."""
        name = self.value(key)
        if ast.unparse(mapping).endswith("environ"):
            self.variables.add(str(name))
        if self.taken and ast.unparse(mapping).endswith("environ") and str(name).startswith(SETTINGS):
            self.environment[str(name)] = self.value(value)
        if (
            self.taken
            and ast.unparse(mapping).endswith("environ")
            and name in ALLOCATOR
            and not (absent and name in self.of_allocator)
        ):
            self.of_allocator[str(name)] = str(self.value(value))
        owner = self.value(mapping)
        known = owner if isinstance(owner, dict) and not isinstance(owner, Instance) else None
        if known is None or not isinstance(mapping, ast.Name) or not isinstance(name, str) or not plain(name):
            if known is None and self.taken and plain(name):
                self.set_elsewhere.add(name)
            self._changed(mapping)
        elif not absent or name not in known:
            self._forget(mapping.id)
            self._keep(mapping.id, {**known, name: self._inside(value)})

    def _mutate(self, changed: ast.expr, method: str, node: ast.Call) -> None:
        """`names.append("q_proj")`: a list of the program that holds other values from here on."""
        before = self.names.get(changed.id) if isinstance(changed, ast.Name) else None
        values = [self._inside(each) for each in node.args]
        if not isinstance(before, list) or not self.taken or node.keywords or not plain(values):
            if self.taken and method == "update" and not isinstance(before, dict):
                named = [keyword.arg for keyword in node.keywords if keyword.arg]
                self.set_elsewhere.update(named, *(each for each in values if isinstance(each, dict)))
            self._changed(changed)
            return
        after = [*before]
        try:
            getattr(after, method)(*values)
        except (TypeError, ValueError, IndexError, AttributeError):
            self._changed(changed)
            return
        for name in [name for name, value in self.names.items() if value is before]:
            self._keep(name, after, self.origins.get(name, ()))
