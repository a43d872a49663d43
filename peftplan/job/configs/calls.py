"""Calls of a Python script or a notebook, read from its syntax tree; nothing is imported and nothing runs."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterable, Mapping

from peftplan.job.configs.documents import BrokenFileError, Call, Document, Values

WANTED = ("Config", "Trainer", "from_pretrained", "get_peft_model", "Arguments", "prepare_model_for_kbit_training")
"""Ends of the names of calls that matter."""
SETTINGS = "UNSLOTH_"
"""Start of the names of environment variables that decide how a package trains."""
MAGIC = re.compile(rf"%(?:set_)?env\s+({SETTINGS}\w+)[=\s]\s*(\S+)")
"""A notebook's line that sets one of them."""
MOST_OF_A_TEXT = 40


def of_notebook(text: str, *, file: str) -> Document:
    """The calls of a notebook's code cells. Lines for the shell and magics are left out."""
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BrokenFileError(file, None, "not a notebook; accepted: JSON with cells") from None
    reader = _Calls()
    for source in sources:
        reader.environment |= dict(MAGIC.findall(source))
        lines = ["pass" if line.lstrip().startswith(("!", "%")) else line for line in source.splitlines()]
        reader.read("\n".join(lines), file=None)
    return _document(reader, file)


def of_script(text: str, *, file: str) -> Document:
    """The calls of a Python script."""
    reader = _Calls()
    reader.read(text, file=file)
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    return _document(reader, file)._replace(comments=comments)


def _document(reader: _Calls, file: str) -> Document:
    if not reader.calls:
        raise BrokenFileError(file, None, "accepted: a program that calls from_pretrained, get_peft_model or a Trainer")
    settings = [Call(call="os.environ", args=[], kwargs=reader.environment)] if reader.environment else []
    return Document({"calls": reader.calls + settings}, kind="calls")


def arguments(calls: Iterable[Call], kinds: Mapping[str, str], last: Collection[str] = ()) -> Values:
    """The arguments of the first call of each kind: `load.max_seq_length`; later ones count as calls after training.

    `kinds`: name of a call → what stands before its arguments. `last`: calls that stand in place of all others of their kind, as
    the second training of a program does that needs more than the first.
    """
    values: Values = {}
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
    return values


class _Calls(ast.NodeVisitor):
    """The calls in the order of the text; names that were assigned once to a plain value stand for it.

    `environment`: variables of packages that the program sets, by their names.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.names: Values = {}
        self.environment: Values = {}

    def read(self, source: str, *, file: str | None) -> None:
        """Add the calls of a source. A cell that is no Python is left out; a file that is none raises BrokenFileError."""
        try:
            self.visit(ast.parse(source))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if file is not None:
                line = getattr(error, "lineno", None)
                raise BrokenFileError(file, line, f"not Python: {error}") from None

    def visit_Assign(self, node: ast.Assign) -> None:
        """A name for a plain value, or `os.environ["NAME"] = value`."""
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Subscript):
                self._set(target.value, target.slice, node.value)
        if len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = self.value(node.value)
            if (
                isinstance(value, (int, float, bool, list))
                or value is None
                or (isinstance(value, str) and not value.startswith("<"))
            ):
                self.names[node.targets[0].id] = value

    def visit_Call(self, node: ast.Call) -> None:
        """A call, if its name is one of those that matter; what it is called with stands before it."""
        self.generic_visit(node)
        name = ast.unparse(node.func)[:200]
        if isinstance(node.func, ast.Attribute) and node.func.attr == "setdefault" and len(node.args) > 1:
            self._set(node.func.value, *node.args[:2])
        if name.endswith(WANTED):
            kwargs = {keyword.arg: self.value(keyword.value) for keyword in node.keywords if keyword.arg}
            starred = {"**": "<keyword arguments>"} if any(keyword.arg is None for keyword in node.keywords) else {}
            self.calls.append({"call": name, "args": [self.value(each) for each in node.args], "kwargs": kwargs | starred})

    def _set(self, mapping: ast.expr, key: ast.expr, value: ast.expr) -> None:
        """A variable of the environment, if the mapping is the environment and the variable is one of those that matter."""
        name = self.value(key)
        if ast.unparse(mapping).endswith("environ") and str(name).startswith(SETTINGS):
            self.environment[str(name)] = self.value(value)

    def value(self, node: ast.expr) -> object:
        """A plain value, or `<text>` of what only the program knows."""
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            pass
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.names[node.id]
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self.value(each) for each in node.elts]
        text = " ".join(ast.unparse(node).split())[:MOST_OF_A_TEXT]
        return f"<call {ast.unparse(node.func)[:MOST_OF_A_TEXT]}>" if isinstance(node, ast.Call) else f"<{text}>"
