"""Functions of a program: their parameters, and who may call them; nothing runs."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Sequence

from peftplan.job.configs.bindings import MUTATORS

QUANTIZED_LAYERS = ("Linear4bit", "Linear8bitLt")
"""bitsandbytes' classes."""
CHANGING = (*MUTATORS, "setdefault")
"""Methods that change a list, a dictionary or a set, `setdefault` included."""
BINDING = (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.For, ast.AsyncFor, ast.comprehension)
"""What gives names a value."""
Function = ast.FunctionDef | ast.AsyncFunctionDef
Functions = dict[str, Function | None]
"""Functions of a program by their names; None where a name is that of several."""


def functions_of(nodes: list[ast.AST], overwritten: Collection[ast.AST]) -> Functions:
    """All functions among the nodes, less those that another one takes the place of."""
    functions: Functions = {}
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node not in overwritten:
            functions[node.name] = None if node.name in functions else node
    return functions


def constructors_of(nodes: list[ast.AST]) -> dict[str, Function]:
    """Class of the program → its `__init__`, or the one that it inherits from another class of the program."""
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    own: dict[str, Function] = {
        name: each
        for name, node in classes.items()
        for each in node.body
        if isinstance(each, ast.FunctionDef) and each.name == "__init__"
    }
    for _ in classes:
        inherited = {
            name: own[base]
            for name, node in classes.items()
            for base in map(ast.unparse, node.bases)
            if name not in own and base in own
        }
        own |= inherited
        if not inherited:
            break
    return own


def overwritten_in(block: Sequence[ast.stmt]) -> set[ast.AST]:
    """Functions of a module or class that nothing calls before another one of the same name is defined, and of classes in it."""
    overwritten: set[ast.AST] = set()
    latest: dict[str, ast.AST] = {}
    names = Counter(each.name for each in block if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)))
    several = {name for name, times in names.items() if times > 1}
    for statement in block:
        if isinstance(statement, ast.ClassDef):
            overwritten |= overwritten_in(statement.body)
        if not several:
            continue
        for each in ast.walk(statement):
            if isinstance(each, (ast.Name, ast.Attribute)):
                latest.pop(each.id if isinstance(each, ast.Name) else each.attr, None)
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)) and statement.name in several:
            if statement.name in latest:
                overwritten.add(latest[statement.name])
            if not statement.decorator_list:
                latest[statement.name] = statement
    return overwritten


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
    """Names that are bound at a time that the text does not tell: by a function outside itself, by `globals()`, or by `exec`."""
    elsewhere = {name for node in nodes if isinstance(node, (ast.Global, ast.Nonlocal)) for name in node.names}
    names: set[str | None] = set()
    for node in nodes:
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and _is_namespace(node.value):
            names.add(node.slice.value if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str) else None)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "exec":
            names |= {None} if len(node.args) < 2 or _is_namespace(node.args[-1]) else set()  # into the last of its dictionaries
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and _is_namespace(node.func.value)
            and node.func.attr not in ("get", "items", "keys", "values", "copy")
        ):
            names |= {None} if node.args else {each.arg for each in node.keywords}
    if None in names:
        names |= {each.id for each in nodes if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load)}
    return elsewhere | {name for name in names if name is not None}


def _is_namespace(node: ast.expr) -> bool:
    """Whether an expression is the names of a module."""
    return isinstance(node, ast.Call) and not node.args and ast.unparse(node.func) in ("globals", "locals", "vars")


def fields_written_by(function: ast.FunctionDef | ast.AsyncFunctionDef, parameter: str) -> set[str | None]:
    """Attributes that a function sets of what it is called with; None for those whose names only the program knows."""
    fields: set[str | None] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == parameter:
            fields.add(node.attr)
        elif isinstance(node, ast.Call) and len(node.args) == 3 and ast.unparse(node.args[0]) == parameter:
            name = node.args[1]
            if ast.unparse(node.func)[:200] in ("setattr", "object.__setattr__"):
                fields.add(name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None)
    return fields


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of all parameters."""
    each = node.args
    rest = [one for one in (each.vararg, each.kwarg) if one]
    return [one.arg for one in (*each.posonlyargs, *each.args, *each.kwonlyargs, *rest)]


def grown_outside(node: ast.FunctionDef | ast.AsyncFunctionDef, methods: Collection[str]) -> set[str]:
    """Names of lists and dictionaries that are not the function's own and that it changes, by one of these methods or an item."""
    own = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load)}
    called = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
    changed = [each.value for each in called if isinstance(each, ast.Attribute) and each.attr in methods]
    changed += [each.value for each in ast.walk(node) if isinstance(each, ast.Subscript) and not isinstance(each.ctx, ast.Load)]
    return {each.id for each in changed if isinstance(each, ast.Name)} - own - {*parameters(node)}


def changes(function: Function, parameter: str, functions: Functions, depth: int = 5) -> bool:
    """Whether a function may change the list or dictionary that a parameter holds, or one inside it: itself, or by one of the
    program's functions that it hands it on to."""
    names = _holding(function, parameter)
    for each in ast.walk(function):
        if isinstance(each, ast.Subscript) and not isinstance(each.ctx, ast.Load) and _mentions(each.value, names):
            return True
        if isinstance(each, ast.AugAssign) and _mentions(each.target, names):
            return True
        if not isinstance(each, ast.Call):
            continue
        if isinstance(each.func, ast.Attribute) and each.func.attr in CHANGING and _mentions(each.func.value, names):
            return True
        if (name := ast.unparse(each.func).removeprefix("self.")) in functions:
            called = functions[name]
            handed_on = [value for value in (*each.args, *(one.value for one in each.keywords)) if _mentions(value, names)]
            if not handed_on:
                continue
            if called is None or depth == 0 or any(changes(called, one, functions, depth - 1) for one in parameters(called)):
                return True
    return False


def _holding(function: Function, parameter: str) -> set[str]:
    """The names of a function that may hold what a parameter does, or a part of it."""
    names, count = {parameter}, 0
    while len(names) > count:
        count = len(names)
        for each in ast.walk(function):
            value = getattr(each, "iter", getattr(each, "value", None))
            if isinstance(each, BINDING) and _mentions(value, names):
                targets = each.targets if isinstance(each, ast.Assign) else [each.target]
                names |= {name for target in targets for one in _targets(target) if (name := _dotted(one))}
    return names


def _targets(node: ast.expr) -> list[ast.expr]:
    """What an assignment binds, one by one; of `held["a"]` what holds it."""
    if isinstance(node, (ast.Tuple, ast.List)):
        return [one for each in node.elts for one in _targets(each)]
    return _targets(node.value) if isinstance(node, (ast.Subscript, ast.Starred)) else [node]


def _dotted(node: ast.AST) -> str:
    """`self.settings` of an attribute of a name, and a name; nothing of other expressions."""
    of_name = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return ast.unparse(node) if of_name else node.id if isinstance(node, ast.Name) else ""


def _mentions(node: ast.AST | None, names: Collection[str]) -> bool:
    return node is not None and any(_dotted(each) in names for each in ast.walk(node))


def names_quantized_layers(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function lists the last names of all 4- or 8-bit linear layers but `lm_head`, as QLoRA's own script does.

    One that mentions other names may leave out more.
    """
    called = {each.func.attr for each in ast.walk(node) if isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute)}
    classes = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    words = {
        each.value for part in body for each in ast.walk(part) if isinstance(each, ast.Constant) and isinstance(each.value, str)
    }
    return {"named_modules", "split"} <= called and not classes.isdisjoint(QUANTIZED_LAYERS) and words == {".", "lm_head"}


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
