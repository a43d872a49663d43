"""What the names of a program hold where it branches, loops and binds them anew; what depends on the way is unknown."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Sequence

from peftplan.job.configs.bindings import MUTATORS, common, leaves, own_names
from peftplan.job.configs.expressions import Expressions
from peftplan.job.configs.instances import MOST_VALUES, Instance, contains, plain, size

SUPPRESSING = ("suppress", "raises", "assertRaises", "assertRaisesRegex")
"""Ends of the names of contexts that end where an exception is raised, and the program goes on."""

LIBRARIES = ("accelerate", "datasets", "peft", "torch", "transformers", "trl", "typing", "unsloth")
"""Packages whose `import *` brings no names that a program uses for its own values."""


class Flow(ast.NodeVisitor, Expressions):
    """Visits statements in the order of the text, and keeps for each name what it holds on every way there."""

    def __init__(self) -> None:
        super().__init__()
        self.bound: dict[ast.AST, frozenset[str]] = {}
        """Part of the program → names that it binds."""
        self.taken = True
        """Whether the program takes the way that is being read, as far as its tests are known."""
        self.unsure = False
        """Whether the program may pass by what is being read, or pass there several times."""
        self.undecided = False
        """Whether only the program knows if it passes there at all."""
        self.chosen_by: frozenset[str] = frozenset()
        """Options of the command line whose defaults choose that way."""

    def visit_Name(self, node: ast.Name) -> None:
        """A name that is bound or deleted holds nothing known until an assignment says more."""
        if not isinstance(node.ctx, ast.Load):
            self.names.pop(node.id, None)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """An attribute that is bound or deleted likewise."""
        if not isinstance(node.ctx, ast.Load):
            self._write(node, f"<{node.attr}>")
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """An item that is set or deleted changes what holds it."""
        if not isinstance(node.ctx, ast.Load):
            self._changed(node.value)
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        """Names of other modules; with `*` any name may be one of theirs."""
        of_program = isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] not in LIBRARIES
        if of_program and node.names[0].name == "*":
            self.names = {"__name__": self.names["__name__"]}
        for alias in node.names:
            self.names.pop(alias.asname or alias.name.partition(".")[0], None)
            if alias.asname:
                self._rename(alias.asname, alias.name)

    visit_ImportFrom = visit_Import

    def visit_Return(self, node: ast.Return) -> None:
        """What stands behind it is not taken."""
        self.generic_visit(node)
        self.taken = False

    def visit_Raise(self, node: ast.Raise) -> None:
        """Likewise, up to a handler."""
        self.generic_visit(node)
        self.taken = False

    def visit_With(self, node: ast.With | ast.AsyncWith) -> None:
        """A body, which may end anywhere where exceptions in it are expected."""
        for item in node.items:
            self.visit(item)
        called = [each.context_expr.func for each in node.items if isinstance(each.context_expr, ast.Call)]
        if any(ast.unparse(each).rpartition(".")[2] in SUPPRESSING for each in called):
            self.visit_Try(ast.Try(node.body, [ast.ExceptHandler(None, None, [ast.Pass()])], [], []))
        else:
            for each in node.body:
                self.visit(each)

    visit_AsyncWith = visit_With

    def visit_If(self, node: ast.If) -> None:
        """Both ways are read for their calls; names keep what the way gives that is taken, or what both give."""
        self._choice(node, node.test, node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """One of two expressions."""
        self._choice(node, node.test, [node.body], [node.orelse])

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """`a and b`: what stands behind a part that decides is not taken."""
        first, *others, rest = node.values
        for each in reversed(others):
            rest = ast.BoolOp(node.op, [each, rest])
        goes_on, ends = ([rest], []) if isinstance(node.op, ast.And) else ([], [rest])
        self._choice(node, first, goes_on, ends)

    def _choice(self, node: ast.AST, test: ast.expr, body: Sequence[ast.AST], orelse: Sequence[ast.AST]) -> None:
        self.visit(test)
        self.by_default = set()
        holds = self._truth(test)
        self._ways(node, [body, orelse], None if holds is None else [body if holds else orelse], self.by_default)

    def visit_While(self, node: ast.While) -> None:
        """A loop: names that it binds hold something else in each round."""
        if self._truth(node.test) is False:
            self._choice(node, node.test, node.body, node.orelse)
        else:
            self._loop(node, node.test)

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        """A loop, whose own name has many values."""
        self._loop(node, node.iter, node.target)

    visit_AsyncFor = visit_For

    def visit_Try(self, node: ast.Try | ast.TryStar) -> None:
        """The whole body, or a part of it and one of the handlers."""
        names = self._bound(node)
        before = self._values_of(names)
        outer, undecided = self.taken, self.undecided
        for each in node.body:
            self.visit(each)
        fails = outer and not self.taken
        failed = self._steady(common([before, self._values_of(names)]), node.body)
        for each in node.orelse:
            self.visit(each)
        may_end = self.taken
        ends = [] if fails or leaves([*node.body, *node.orelse][-1]) else [self._values_of(names)]
        unsure = self.unsure
        for handler in node.handlers:
            self._restore(names, failed)
            self.taken = outer
            self.unsure, self.undecided = unsure or not fails, undecided or not fails
            self.visit(handler)
            may_end = may_end or self.taken
            if not leaves(handler.body[-1]):
                ends.append(self._values_of(names))
        self._restore(names, common(ends) if ends else {})
        self.taken, self.unsure, self.undecided = outer, unsure, undecided
        for each in node.finalbody:
            self.visit(each)
        self.taken = self.taken and may_end

    visit_TryStar = visit_Try

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        """The exception is unknown."""
        self.names.pop(node.name or "", None)
        self.generic_visit(node)

    def visit_Match(self, node: ast.Match) -> None:
        """One of the cases, or none."""
        self.visit(node.subject)
        ways: list[list[ast.AST]] = [[], *([case, *case.body] for case in node.cases)]
        self.by_default = set()
        at = self._case(self.value(node.subject), node.cases)
        self._ways(node, ways, None if at is None else [ways[at]], self.by_default)

    def _case(self, subject: object, cases: Sequence[ast.match_case]) -> int | None:
        """Which case holds, from 1, or none of them, 0; None where only the program knows."""
        if not plain(subject):
            return None
        for number, case in enumerate(cases, 1):
            matched: bool | None = None
            if isinstance(case.pattern, ast.MatchValue) and plain(value := self.value(case.pattern.value)):
                matched = value == subject
            elif isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None:
                matched = True
            if matched is None or (matched and case.guard is not None):
                return None
            if matched:
                return number
        return 0

    def visit_match_case(self, node: ast.match_case) -> None:
        """The names of a pattern."""
        for name in self._bound(node.pattern):
            self.names.pop(name, None)

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        """An expression with names of its own, unknown in it."""
        self._apart(node)
        self._changed_in(node)

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Likewise."""
        self._apart(node)

    def _apart(self, node: ast.expr) -> None:
        names = self._bound(node)
        before = self._values_of(names)
        for name in names:
            self.names.pop(name, None)
        self.generic_visit(node)
        self._restore(names, before)

    def _bound(self, node: ast.AST) -> frozenset[str]:
        """The names that a part of a program binds, and the attributes (`.name`)."""
        if node not in self.bound:
            names, todo = own_names(node), [*ast.iter_child_nodes(node)]
            while todo:
                each = todo.pop()
                if isinstance(each, (ast.stmt, ast.BoolOp, ast.IfExp)):
                    names |= self._bound(each)
                else:
                    names |= own_names(each)
                    todo += ast.iter_child_nodes(each)
            self.bound[node] = frozenset(names - {""})
        return self.bound[node]

    def _loop(self, node: ast.stmt, first: ast.expr, *targets: ast.expr) -> None:
        self.visit(first)
        names = self._bound(node)
        before = self._values_of(names)
        for name in names:
            self.names.pop(name, None)
        outer, unsure = self.taken, self.unsure
        self.unsure = True
        leaves_early = any(isinstance(each, (ast.Break, ast.Continue)) for each in ast.walk(node))
        for each in [*targets, *getattr(node, "body", []), *getattr(node, "orelse", [])]:
            self.visit(each)
        self.taken, self.unsure = outer, unsure
        after = common([before, self._values_of(names)])
        self._restore(names, self._steady(after, getattr(node, "body", [])) if leaves_early else after)

    def _steady(
        self, values: dict[str, tuple[object, frozenset[str]]], body: Sequence[ast.AST]
    ) -> dict[str, tuple[object, frozenset[str]]]:
        """The values of names that not several statements of a body bind, which may end between them."""
        times = Counter(name for each in body for name in self._bound(each))
        return {name: value for name, value in values.items() if times[name] < 2}

    def _ways(
        self,
        node: ast.AST,
        ways: Sequence[Sequence[ast.AST]],
        taken: Sequence[Sequence[ast.AST]] | None,
        by_default: Iterable[str] = (),
    ) -> None:
        """Visit all ways from here, and keep what all those end with that go on and are taken (None: any may be)."""
        names = self._bound(node)
        options = frozenset(by_default)
        before = self._values_of(names)
        ends = []
        may_end = False
        outer, unsure, undecided = (self.taken, self.chosen_by), self.unsure, self.undecided
        self.chosen_by |= options if taken is not None else frozenset()
        for way in ways:
            self._restore(names, before)
            is_taken = taken is None or any(way is each for each in taken)
            self.taken = outer[0] and is_taken
            self.unsure, self.undecided = unsure or taken is None, undecided or taken is None
            for each in way:
                self.visit(each)
            goes_on = self.taken or not outer[0]
            may_end = may_end or (is_taken and goes_on)
            if is_taken and goes_on and not (way and leaves(way[-1])):
                ends.append(self._values_of(names))
        self.taken, self.chosen_by, self.unsure, self.undecided = outer[0] and may_end, outer[1], unsure, undecided
        kept = common(ends) if ends else {}
        self._restore(names, kept)
        for name, (value, _) in kept.items():
            if options and before.get(name, (None,))[0] != value and not name.startswith("."):
                self.origins[name] |= options

    def _values_of(self, names: Iterable[str]) -> dict[str, tuple[object, frozenset[str]]]:
        """What names hold here, and attributes (`.name`), with the options behind it."""
        values = {name: (self.names[name], self.origins.get(name, frozenset())) for name in names if name in self.names}
        attributes = [name for name in names if name.startswith(".")]
        return values | {name: (self.attributes[name[1:]], frozenset()) for name in attributes if name[1:] in self.attributes}

    def _restore(self, names: Iterable[str], values_before: dict[str, tuple[object, frozenset[str]]]) -> None:
        """Let names hold what `values_before` says, and nothing known where it says nothing."""
        for name in names:
            values, key = (self.attributes, name[1:]) if name.startswith(".") else (self.names, name)
            values.pop(key, None)
            if name in values_before:
                values[key], self.origins[name] = values_before[name]

    def _changed(self, mapping: ast.expr) -> None:
        """A list, a dictionary or an object that holds something else from here on."""
        of_a_part = isinstance(mapping, ast.Subscript)
        while isinstance(mapping, (ast.Subscript, ast.Call)):
            if isinstance(mapping, ast.Call) and mapping.args and ast.unparse(mapping.func) == "vars":
                self._note_unseen(mapping.args[0])
            mapping = mapping.value if isinstance(mapping, ast.Subscript) else mapping.func
        if isinstance(mapping, ast.Name):
            self._forget(mapping.id, of_a_part=of_a_part)
        elif isinstance(mapping, ast.Attribute):
            self._forget_values(self.value(mapping), of_a_part=of_a_part)
            if mapping.attr == "__dict__":
                self._note_unseen(mapping.value)
            self._write(mapping, f"<{mapping.attr}>")

    def _note_unseen(self, changed: ast.expr) -> None:
        """An object that the program changes in a way that its text does not tell."""

    def _changed_in(self, node: ast.AST) -> None:
        """What the methods that an expression calls change."""
        for each in ast.walk(node):
            if isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute) and each.func.attr in MUTATORS:
                self._changed(each.func.value)

    def _forget(self, name: str, *, of_a_part: bool = False) -> None:
        """A name whose object changed, and all others of the same one."""
        self._forget_values(self.names.pop(name, None), of_a_part=of_a_part)

    def _forget_values(self, changed: object, *, of_a_part: bool) -> None:
        """All names of an object that changed, or of one that it is a part of; of its parts too where one of them changed."""
        if isinstance(changed, (list, dict)):
            others = [other for other, value in self.names.items() if contains(value, changed)]
            inside = of_a_part and [name for name, value in self.names.items() if isinstance(value, (list, dict))]
            others += [name for name in inside or () if contains(changed, self.names[name])]
            for other in others:
                self.names.pop(other, None)

    def _write(self, target: ast.Attribute, value: object) -> None:
        """Let an attribute hold a value: of the object behind a name where that is known, and of whatever has the attribute."""
        owner = self.names.get(target.value.id) if isinstance(target.value, ast.Name) else None
        if isinstance(target.value, ast.Name) and isinstance(owner, Instance) and size([owner, value]) <= MOST_VALUES:
            self._forget(target.value.id)
            self.names[target.value.id] = owner.with_fields({target.attr: value})
        self._note_written(target, value)
        self._field(target.attr, value, ast.unparse(target.value)[:200])

    def _note_written(self, target: ast.Attribute, value: object) -> None:
        """What else an attribute that is written decides."""

    def _field(self, name: str, value: object, owner: str) -> None:
        """Note a value of an attribute, and whose: `args`, or `class Config`."""
        self.attributes[name] = (
            value if size(value) <= MOST_VALUES and (plain(value) or isinstance(value, Instance)) else f"<{name}>"
        )
        self.owners[name] = (owner, self.function)
        self.values_of.setdefault(name, set()).add(repr(self.attributes[name]))
