"""Calls of a Python script or a notebook, read from its syntax tree; nothing is imported and nothing runs."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Collection, Iterable, Mapping

from peftplan.job.configs.documents import BrokenFileError, Call, Document, Values
from peftplan.job.configs.expressions import Expressions, plain, text_of

WANTED = ("Config", "Trainer", "from_pretrained", "get_peft_model", "Arguments", "prepare_model_for_kbit_training")
"""Ends of the names of calls that matter."""
Arguments = dict[str, dict[str, list[tuple[object, set[str]]]]]
"""Function → parameter → what each call gives it, and the options of the command line whose defaults that holds."""
SETTINGS = "UNSLOTH_"
"""Start of the names of environment variables that decide how a package trains."""
MAGIC = re.compile(rf"%(?:set_)?env\s+({SETTINGS}\w+)[=\s]\s*(\S+)")
"""A notebook's line that sets one of them."""
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def of_notebook(text: str, *, file: str) -> Document:
    """The calls of a notebook's code cells. Lines for the shell and magics are left out, and cells that are no Python."""
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BrokenFileError(file, None, "not a notebook; accepted: JSON with cells") from None
    settings = {name: value for source in sources for name, value in MAGIC.findall(source)}
    trees = []
    for source in sources:
        lines = ["pass" if line.lstrip().startswith(("!", "%")) else line for line in source.splitlines()]
        with contextlib.suppress(*UNREADABLE):
            trees += ast.parse("\n".join(lines)).body
    return _document(_read(trees, settings), file)


def of_script(text: str, *, file: str) -> Document:
    """The calls of a Python script."""
    try:
        tree = ast.parse(text)
    except UNREADABLE as error:
        raise BrokenFileError(file, getattr(error, "lineno", None), f"not Python: {error}") from None
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    return _document(_read(tree.body, {}), file)._replace(comments=comments)


def _read(statements: list[ast.stmt], environment: Values) -> _Calls:
    """The calls of a program, which is read twice: what functions are called with stands below them."""
    program = ast.Module(statements, [])
    functions = {node.name: node for node in ast.walk(program) if isinstance(node, ast.FunctionDef)}
    first = _Calls(functions, {}, environment)
    with contextlib.suppress(RecursionError):
        first.visit(program)
    reader = _Calls(functions, first.called_with, environment)
    reader.attributes |= first.attributes
    with contextlib.suppress(RecursionError):
        reader.visit(program)
    return reader


def _document(reader: _Calls, file: str) -> Document:
    if not reader.calls:
        raise BrokenFileError(file, None, "accepted: a program that calls from_pretrained, get_peft_model or a Trainer")
    settings = [Call(call="os.environ", args=[], kwargs=reader.environment)] if reader.environment else []
    return Document({"calls": reader.calls + reader.lengths + settings}, kind="calls")


def arguments(calls: Iterable[Call], kinds: Mapping[str, str], last: Collection[str] = ()) -> tuple[Values, dict[str, list[str]]]:
    """The arguments of the first call of each kind, `load.max_seq_length`; later ones count as calls after training.

    `kinds`: name of a call → what stands before its arguments. `last`: calls that stand in place of all others of their kind, as
    the second training of a program does that needs more than the first. Behind the arguments, those that hold a default of the
    program's command line or environment → its options.
    """
    values: Values = {}
    defaults: dict[str, list[str]] = {}
    calls = list(calls)
    trained_last = {kinds[call["call"]] for call in calls if call["call"] in last}
    for call in calls:
        kind = kinds.get(call["call"])
        if kind is None or kind in values or (kind in trained_last and call["call"] not in last):
            times = sum(key.startswith(f"later.{call['call']}") for key in values) + 1
            values[f"later.{call['call']}#{times}"] = "call"
            continue
        by_place = {str(index): value for index, value in enumerate(call["args"])}
        values[kind] = {"call": call["call"], **by_place, **call["kwargs"]}
        defaults |= {f"{kind}.{name}": options for name, options in call.get("defaults", {}).items()}
    return values, defaults


class _Calls(ast.NodeVisitor, Expressions):
    """The calls in the order of the text, with the values of their arguments.

    `environment`: variables of packages that the program sets, by their names. `arguments_of`: of a function of the program, its
    parameters → what its calls give them, as a first reading found it.
    """

    def __init__(self, functions: Mapping[str, ast.FunctionDef], arguments_of: Arguments, environment: Values) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.lengths: list[Call] = []
        """Calls that cut texts: of a tokenizer, whatever its name."""
        self.functions, self.arguments_of, self.environment = functions, arguments_of, dict(environment)
        self.called_with: Arguments = {}
        self.classes: set[str] = set()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """The fields of a class, as attributes of whatever is made of it."""
        self.classes.add(node.name)
        for statement in node.body:
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                field, default = statement.targets[0], statement.value
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                field, default = statement.target, statement.value
            else:
                self.visit(statement)
                continue
            if isinstance(field, ast.Name):
                self.attributes[field.id] = self.value(_of_field(default))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """A function: its parameters are what its calls give them, else their defaults; its names end with it."""
        outside = dict(self.names)
        parameters = [*node.args.posonlyargs, *node.args.args]
        defaulted = [*zip(parameters[len(parameters) - len(node.args.defaults) :], node.args.defaults, strict=True)]
        defaulted += [(each, value) for each, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if value]
        values: Values = {parameter.arg: self.value(default) for parameter, default in defaulted}
        for name, value in values.items():
            self._keep(name, value)
        for name, pairs in self.arguments_of.get(node.name, {}).items():
            value, options = pairs[0]
            self._keep(name, value if all(each == value for each, _ in pairs) else f"<{name}>", options)
        self.generic_visit(node)
        self.names = outside

    def visit_For(self, node: ast.For) -> None:
        """A loop, whose name has many values."""
        for each in ast.walk(node.target):
            if isinstance(each, ast.Name):
                self.names.pop(each.id, None)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """A name or an attribute for a plain value, or `os.environ["NAME"] = value`."""
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Subscript):
                self._set(target.value, target.slice, node.value)
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) and len(target.elts) == len(node.value.elts):
                pairs = [*zip(target.elts, node.value.elts, strict=True)]
            for name, value in pairs:
                self._assign(name, value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """A name with its type."""
        self.generic_visit(node)
        if node.value is not None:
            self._assign(node.target, node.value)

    def visit_Call(self, node: ast.Call) -> None:
        """A call, if its name is one of those that matter; what it is called with stands before it."""
        self.generic_visit(node)
        name = ast.unparse(node.func)[:200]
        last = name.rpartition(".")[2]
        if last == "setdefault" and len(node.args) > 1 and isinstance(node.func, ast.Attribute):
            self._set(node.func.value, *node.args[:2])
        if last == "add_argument":
            self._argument(node)
        if last in self.functions:
            self._note_arguments(last, node)
        if name in self.classes or last in ("Namespace", "SimpleNamespace"):
            self.attributes |= {keyword.arg: self.value(keyword.value) for keyword in node.keywords if keyword.arg}
        if name.endswith(WANTED) and name not in self.classes:
            self.calls.append(self._called(name, node))
        elif last == "gradient_checkpointing_enable":
            self.calls.append(self._called(last, node))
        elif {"truncation", "max_length"} <= {keyword.arg for keyword in node.keywords}:
            self.lengths.append(self._called("tokenizer", node))

    def _called(self, name: str, node: ast.Call) -> Call:
        arguments: Values = {}
        defaults: dict[str, list[str]] = {}
        by_index = [(str(index), each) for index, each in enumerate(node.args)]
        for key, expression in [*by_index, *((keyword.arg, keyword.value) for keyword in node.keywords)]:
            value = self.fresh(expression)
            if key is None:
                arguments |= value if isinstance(value, dict) else {"**": "<keyword arguments>"}
                continue
            arguments[key] = text_of(expression) if isinstance(value, dict) and not plain(value) else value
            if self.by_default:
                defaults[key] = sorted(self.by_default)
        by_place = [arguments.pop(key) for key, _ in by_index]
        call: Call = {"call": name, "args": by_place, "kwargs": arguments}
        return {**call, "defaults": defaults} if defaults else call

    def _argument(self, node: ast.Call) -> None:
        """An option of the command line, with the value that it has unless somebody gives another."""
        keywords = {keyword.arg: self.value(keyword.value) for keyword in node.keywords}
        options = [option for option in map(self.value, node.args) if isinstance(option, str) and option.startswith("--")]
        if options and keywords.get("required") is not True:
            name = str(keywords.get("dest") or options[0].lstrip("-").replace("-", "_"))
            switch = {"store_true": False, "store_false": True}.get(str(keywords.get("action")))
            self.attributes[name] = keywords.get("default", switch)
            self.arguments[name] = options[0]

    def _note_arguments(self, function: str, node: ast.Call) -> None:
        """What a call gives the parameters of a function of the program."""
        parameters = [each.arg for each in self.functions[function].args.args]
        if parameters[:1] == ["self"]:
            parameters = parameters[1:]
        pairs = [*zip(parameters, node.args, strict=False)]
        pairs += [(keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg]
        for parameter, value in pairs:
            self.called_with.setdefault(function, {}).setdefault(parameter, []).append((self.fresh(value), self.by_default))

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._keep(target.id, self.fresh(value), self.by_default)
        elif isinstance(target, ast.Attribute) and plain(assigned := self.value(value)):
            self.attributes[target.attr] = assigned

    def _set(self, mapping: ast.expr, key: ast.expr, value: ast.expr) -> None:
        """A variable of the environment that matters, or an item of a dictionary of the program."""
        name = str(self.value(key))
        if ast.unparse(mapping).endswith("environ") and name.startswith(SETTINGS):
            self.environment[name] = self.value(value)
        owner = self.value(mapping)
        if isinstance(mapping, ast.Name) and isinstance(owner, dict):
            self._keep(mapping.id, {**owner, name: self.value(value)})


def _of_field(value: ast.expr) -> ast.expr:
    """The default of `field(default=…)` and `field(default_factory=lambda: …)`; other values themselves."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
        for keyword in value.keywords:
            if keyword.arg == "default":
                return keyword.value
            if keyword.arg == "default_factory" and isinstance(keyword.value, ast.Lambda):
                return keyword.value.body
    return value
