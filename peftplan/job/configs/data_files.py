"""YAML and JSON files that a program reads its settings from, and what its functions return; nothing runs."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator

from peftplan import files
from peftplan.errors import InputError
from peftplan.job.configs.documents import MOST_BYTES, Document, Values, read_json, read_yaml
from peftplan.job.configs.functions import names_quantized_layers
from peftplan.job.configs.instances import UNKNOWN, Instance, one_of, plain
from peftplan.job.configs.launch_files import in_tree
from peftplan.job.configs.parsers import Parsers

READERS = {
    **dict.fromkeys(("yaml.safe_load", "yaml.load", "yaml.full_load", "OmegaConf.load"), read_yaml),
    **dict.fromkeys(("json.load", "json.loads"), read_json),
}
"""Functions that make values of a file, or of its text → how it is read here."""
PARSED = {"parse_dict": None, "parse_yaml_file": read_yaml, "parse_json_file": read_json}
"""Methods of transformers' parser that take settings from elsewhere than the command line → how their file is read."""
PATHS = ("open", "Path", "abspath", "realpath", "expanduser", "dirname", "join")
"""Last names of functions that take paths."""
UNCHANGED = ("resolve", "absolute", "expanduser")
"""Methods of a path that lead to the same file."""
OPENED = "<opened>"
"""The field of an open file, or of its text, that holds its path."""
MOST_ABOVE = 6
"""Folders above a program's own from which its paths may begin."""


class DataFiles(Parsers):
    """Reads files of the program's tree that it opens by a known path, and remembers what its functions return."""

    def __init__(self) -> None:
        super().__init__()
        self.file = ""
        """The program's own."""
        self.reads_files = False
        self.returns: dict[str, list[tuple[object, frozenset[str]]]] = {}
        """Function → what each `return` gives, and the options of the command line whose defaults that holds."""
        self.returns_before: dict[str, list[tuple[object, frozenset[str]]]] = {}
        """Likewise, as an earlier reading found."""

    def visit_Return(self, node: ast.Return) -> None:
        """What a function gives back on a way that it takes."""
        if self.taken and node.value is not None:
            value = self.fresh(node.value)
            self.returns.setdefault(self.function.rpartition(".")[2], []).append((value, frozenset(self.by_default)))
        super().visit_Return(node)

    def visit_withitem(self, node: ast.withitem) -> None:
        """`open(path) as file`."""
        value = self.value(node.context_expr)
        self.generic_visit(node)
        if isinstance(node.optional_vars, ast.Name) and isinstance(value, Instance) and OPENED in value:
            self._keep(node.optional_vars.id, value)

    def returned(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> object:
        """The dictionary that a function returns on all its ways, or the layers that it lists; UNKNOWN where only the program
        knows it."""
        if names_quantized_layers(function):
            return "all-linear"
        values = self.returns_before.get(function.name, [])
        if not values or not _always_returns(function.body) or function.decorator_list:
            return UNKNOWN
        value = one_of([each for each, _ in values])
        if not isinstance(value, dict) or (isinstance(value, Instance) and value.made_by):
            return UNKNOWN
        self.by_default |= frozenset[str]().union(*(options for _, options in values))
        return value

    def _call(self, node: ast.Call) -> object:
        name = self.name_of(node.func)
        last = name.rpartition(".")[2]
        is_method = last == "open" and isinstance(node.func, ast.Attribute)  # `path.open("r")`
        is_of_path = last in PATHS and (last != "join" or name.endswith("path.join")) and not is_method
        if is_of_path and node.args and all(map(_is_path, values := [self.value(each) for each in node.args])):
            path = str(values[0])
            if last == "open":
                return Instance({OPENED: path})
            return os.path.dirname(path) if last == "dirname" else os.path.join(path, *map(str, values[1:]))
        if last in PARSED and self.parsed and (objects := self._of_settings(node, PARSED[last])) is not None:
            return objects
        if last in ("load", "loads", "safe_load", "full_load") and node.args:
            read = next((each for end, each in READERS.items() if name == end or name.endswith(f".{end}")), None)
            if read is not None and (content := self._content_of(node.args[0], read)) is not None:
                return _objects(content) if name.endswith("OmegaConf.load") else content
        if isinstance(node.func, ast.Attribute) and last in (*UNCHANGED, "open", "read", "read_text"):
            owner = self.value(node.func.value)
            if last == "read" and isinstance(owner, Instance) and OPENED in owner:
                return owner
            if last != "read" and _is_path(owner):
                return owner if last in UNCHANGED else Instance({OPENED: owner})
        return super()._call(node)

    def _of_settings(self, node: ast.Call, read: Callable[..., Document] | None) -> list[object] | None:
        """The objects that a parser makes of a file's values, or of a dictionary; None where they are not known."""
        first = next(iter([*node.args, *(each.value for each in node.keywords)]), None)
        settings = None if first is None else self.value(first)
        if read is not None:
            settings = self._content(str(settings), read) if _is_path(settings) else None
        if not isinstance(settings, dict) or isinstance(settings, Instance):
            return None
        before, self.command = self.command, settings
        objects = self.of_command(node)
        self.command = before
        return objects

    def _content_of(self, node: ast.expr, read: Callable[..., Document]) -> Values | None:
        """The values of a file that an expression opened, whose text it holds, or whose path it is."""
        value = self.value(node)
        path = value.get(OPENED) if isinstance(value, Instance) else value
        known = _is_path(path) and (isinstance(value, Instance) or str(path).endswith((".yaml", ".yml")))
        return self._content(str(path), read) if known else None

    def _plain(self, node: ast.expr) -> object:
        """`folder / "name"` of paths; else as any expression."""
        if isinstance(node, ast.Name) and node.id == "__file__" and self.file:
            return os.path.abspath(self.file)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            left, right = self.value(node.left), self.value(node.right)
            if _is_path(left) and _is_path(right):
                return os.path.join(str(left), str(right))
        if isinstance(node, ast.Attribute) and node.attr == "parent" and _is_path(owner := self.value(node.value)):
            return os.path.dirname(str(owner))
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "parents":
            owner, above = self.value(node.value.value), self.value(node.slice)
            if _is_path(owner) and isinstance(above, int) and 0 <= above < MOST_ABOVE:
                return os.path.normpath(os.path.join(str(owner), *[os.pardir] * (above + 1)))
        return super()._plain(node)

    def _content(self, path: str, read: Callable[..., Document]) -> Values | None:
        """The values of a file in the program's tree; None where there is none, or several that the path may mean."""
        places = {os.path.realpath(each) for each in self._places(path) if os.path.isfile(each) and in_tree(each, self.file)}
        if len(places) != 1:
            return None
        (place,) = places
        try:
            document = read(files.text(place, field="config", most=MOST_BYTES), file=place)
        except InputError:
            return None
        self.reads_files = True
        return {key: _known(value) for key, value in document.values.items()}

    def _places(self, path: str) -> Iterator[str]:
        """Where a path may lead: from the working directory, or from the program's folder or one above it."""
        yield path
        folder = os.path.dirname(os.path.abspath(self.file))
        for _ in range(MOST_ABOVE if not os.path.isabs(path) else 0):
            yield os.path.join(folder, path)
            folder = os.path.dirname(folder)


def _always_returns(body: list[ast.stmt]) -> bool:
    """Whether a block ends with a `return`."""
    last = body[-1]
    return isinstance(last, ast.Return) or (isinstance(last, ast.With) and _always_returns(last.body))


def _is_path(value: object) -> bool:
    return isinstance(value, str) and plain(value) and "\0" not in value


def _known(value: object) -> object:
    """A value of a file; `<text>` of one that another program fills in, such as `${model}`."""
    if isinstance(value, dict):
        return {key: _known(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_known(each) for each in value]
    return f"<{value}>" if isinstance(value, str) and "${" in value else value


def _objects(value: object) -> object:
    """Mappings whose keys a program takes as attributes too."""
    return Instance({key: _objects(each) for key, each in value.items()}) if isinstance(value, dict) else value
