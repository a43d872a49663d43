"""Text of a file → its values, with the line of each key. Nothing in a file is executed.

YAML is read with safe scalars alone: no tags, no key twice, a bounded number of values once aliases are followed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, TypedDict, cast

from peftplan.errors import InputError, quoted

if TYPE_CHECKING:
    from yaml.nodes import MappingNode, Node, ScalarNode

MOST_BYTES = 2**20
"""The largest YAML file, JSON file or script that is read. The longest published one has 60 KB."""
MOST_NODES = 10_000
"""The most values in one file, with aliases followed."""
MOST_DEPTH = 50
CELL = 1_000_000
"""How far the lines of two cells of a notebook are apart, which begin at this times the cell's number."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables with options of torch's allocator."""
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:\n]')
NUMBER = re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+")
"""Numbers that YAML 1.1, and so PyYAML, takes for text: `1e-5`. Tools convert them by the type of the field."""


Values = dict[str, object]
"""Keys with values of any kind, as a file holds them."""


class PlainCall(TypedDict):
    """A call in a script: the name of what is called, and plain values or `<text>` of its arguments."""

    call: str
    args: list[object]
    kwargs: Values


class Call(PlainCall, total=False):
    """A call, and where its arguments come from."""

    defaults: dict[str, list[str]]
    """Arguments that hold a default of the command line or the environment → its options."""
    doubt: str
    """What only the program knows of it."""


class Written(NamedTuple):
    """A file that a script writes: its text, behind as many empty lines as stand before it in the script."""

    text: str
    line: int
    by: str = ""
    """The program that changes the file, so that its text is not known."""


class Document(NamedTuple):
    """The values of a file. `lines`: dotted key → line, where it is known; of calls, `call.argument`."""

    values: Values
    lines: Mapping[str, int] = {}
    kind: str = "values"
    """`values`, `command` or `calls`."""
    program: str = ""
    """The program of a command."""
    environment: Mapping[str, str] = {}
    comments: str = ""
    """The text of a recipe's header."""
    settings: str = ""
    """The file from which a command takes its settings."""
    folder: str = ""
    """Where a command runs, as the script's `cd` says."""
    line: int | None = None
    """The line of a command."""
    assumed: Mapping[str, str] = {}
    """What is assumed of a script that has branches or several commands."""
    installs: str = ""
    """The releases that a notebook's lines for the shell install, or a script requires: `transformers==4.56.2 trl==0.22.2`."""
    saved_from: str = ""
    """How the notebook ends that was saved as this script: `.ipynb`, or `.marimo`."""
    unread: tuple[str, ...] = ()
    """Options of the command that runs a program which the program is not seen to read."""
    chosen: Mapping[str, object] = {}
    """Options of the user, which win over the file."""
    model: Mapping[str, object] = {}
    """The config of the model, where what is read is an object beside it."""
    written: Mapping[str, Written] = {}
    """Path, from the script's folder → a file that the script writes, or changes, before the command runs."""

    @property
    def calls(self) -> list[Call]:
        """What a document of that kind holds, in the order of the text."""
        return cast("list[Call]", self.values["calls"])


def place(file: str, line: int | None) -> str:
    """A file and its line; of a notebook, the cell and the line in it."""
    if line is None or line < CELL:
        return file if line is None else f"{file}:{line}"
    return f"{file}: cell {line // CELL}, line {line % CELL}"


class FileError(InputError):
    """Something wrong in a file: `axolotl.yml:12: micro_batch_size: [1, 2] is not valid; …`."""

    def __init__(self, file: str, line: int | None, field: str, value: object, accepted: str) -> None:
        where = place(file, line)
        super().__init__(f"{where}: {field}" if field else where, value, accepted)


class BrokenFileError(FileError):
    """A file that is not in the format of its kind: `axolotl.yml:3: not YAML: …`."""

    form = "{field}: {accepted}"

    def __init__(self, file: str, line: int | None, why: str) -> None:
        super().__init__(file, line, "", None, why)


def nested(values: Values) -> Values:
    """Values under dotted keys as mappings in mappings."""
    tree: Values = {}
    for dotted, value in values.items():
        *above, last = dotted.split(".")
        inner = tree
        for name in above:
            inner = cast("Values", inner.setdefault(name, {}))
        inner[last] = value
    return tree


def number_in(values: Mapping[str, object], key: str) -> int:
    """The positive whole number under a key, 1 where there is none."""
    number = values.get(key)
    return number if isinstance(number, int) and number > 0 else 1


def read_json(text: str, *, file: str) -> Document:
    """The object of a JSON file."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise BrokenFileError(file, None, f"accepted: at most {MOST_DEPTH} levels") from None
    except ValueError as error:
        line = getattr(error, "lineno", None)
        raise BrokenFileError(file, line, f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise BrokenFileError(file, None, "accepted: a JSON object")
    _check_size(values, file)
    return Document(values, _lines_of_json(text, file))


def _lines_of_json(text: str, file: str) -> dict[str, int]:
    """Dotted key → line of a valid JSON text. Raises BrokenFileError for a key that appears twice in one object."""
    lines: dict[str, int] = {}
    above: list[str] = []  # the keys of the objects and lists that are open, "" in a list
    names: list[set[str]] = []
    line, last = 1, ("", 1)
    for match in JSON_TOKEN.finditer(text):
        token = match[0]
        line += token == "\n"
        if token[0] == '"':
            last = (json.loads(token, strict=False), line)
        elif token == ":":
            if last[0] in names[-1]:
                raise BrokenFileError(file, last[1], f"{quoted(last[0])} appears twice in one object")
            names[-1].add(last[0])
            above[-1] = last[0]
            lines.setdefault(".".join(filter(None, above)), last[1])
        elif token in "{[":
            above.append("")
            names.append(set())
        elif token in "}]":
            above.pop()
            names.pop()
    return lines


def _check_size(values: object, file: str) -> None:
    todo, count = [(values, 0)], 0
    while todo:
        value, depth = todo.pop()
        count += 1
        if count > MOST_NODES or depth > MOST_DEPTH:
            raise BrokenFileError(file, None, f"accepted: at most {MOST_NODES:,} values in at most {MOST_DEPTH} levels")
        if isinstance(value, Mapping):
            todo += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list):
            todo += [(each, depth + 1) for each in value]


def read_yaml(text: str, *, file: str) -> Document:
    """The mapping of a YAML file."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        root = yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(filter(None, (error.context, error.problem)))
        raise BrokenFileError(file, None if mark is None else mark.line + 1, f"not YAML: {what}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise BrokenFileError(file, None, f"not YAML: {error}") from None
    reader = _Yaml(file)
    values = {} if root is None else reader.value(root, "", 0)
    if not isinstance(values, dict):
        raise BrokenFileError(file, 1, "accepted: keys and values, not a list or a string")
    comments = "\n".join(line for line in text.splitlines() if line.lstrip().startswith("#"))
    return Document(values, reader.lines, comments=comments)


class _Yaml:
    """Nodes of YAML → values, counted; `lines` fills as keys are met."""

    def __init__(self, file: str) -> None:
        from yaml.constructor import SafeConstructor

        self.file = file
        self.lines: dict[str, int] = {}
        self.nodes = 0
        safe = SafeConstructor()
        self.scalars = {
            "tag:yaml.org,2002:null": safe.construct_yaml_null,
            "tag:yaml.org,2002:bool": safe.construct_yaml_bool,
            "tag:yaml.org,2002:int": safe.construct_yaml_int,
            "tag:yaml.org,2002:float": safe.construct_yaml_float,
        }

    def value(self, node: Node, key: str, depth: int) -> object:
        """The value of a node under a dotted key."""
        from yaml.nodes import MappingNode, ScalarNode, SequenceNode

        self.nodes += 1
        line = node.start_mark.line + 1
        if self.nodes > MOST_NODES or depth > MOST_DEPTH:
            raise BrokenFileError(self.file, line, f"accepted: at most {MOST_NODES:,} values in at most {MOST_DEPTH} levels")
        if isinstance(node, MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, key, depth)
        if isinstance(node, SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(each, key, depth + 1) for each in node.value]
        if isinstance(node, ScalarNode):
            return self._scalar(node, key, line)
        raise BrokenFileError(
            self.file, line, f"{key or 'the file'}: the tag {node.tag} is not valid; accepted: values without tags"
        )

    def _scalar(self, node: ScalarNode, key: str, line: int) -> object:
        if node.tag in self.scalars:
            try:
                return self.scalars[node.tag](node)
            except (ValueError, KeyError, OverflowError):
                raise FileError(self.file, line, key, node.value, "accepted: a number of fewer digits") from None
        if node.tag in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"):
            return as_number(node.value) if not node.style else node.value
        raise BrokenFileError(self.file, line, f"{key}: the tag {node.tag} is not valid; accepted: values without tags")

    def _mapping(self, node: MappingNode, key: str, depth: int) -> Values:
        values: Values = {}
        merged: Values = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if name_node.tag == "tag:yaml.org,2002:merge":
                value = self.value(value_node, key, depth + 1)
                for each in value if isinstance(value, list) else [value]:
                    if not isinstance(each, dict):
                        raise BrokenFileError(self.file, line, "<<: accepted: a mapping, or a list of mappings")
                    merged = {**each, **merged}
                continue
            name = self.value(name_node, key, depth + 1)
            if not isinstance(name, (str, int, float, bool, type(None))):
                raise BrokenFileError(self.file, line, f"{quoted(name)} is not a key; accepted: a string")
            name = "" if name is None else str(name)
            dotted = f"{key}.{name}" if key else name
            first = self.lines.setdefault(dotted, line)
            value = self.value(value_node, dotted, depth + 1)
            if name in values and repr(values[name]) != repr(value):
                raise BrokenFileError(self.file, line, f"{name} appears twice, with another value in line {first}")
            values[name] = value
        return {**merged, **values}


def as_number(text: str) -> object:
    """The number that a plain text such as `1e-5` is; other text as it is."""
    if not NUMBER.fullmatch(text):
        return text
    number = float(text.replace("_", ""))
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def word(value: object) -> str:
    """A value as the data files write it: lower case, `true`, `none`."""
    return "none" if value is None else str(value).lower()


def by_word(values: Mapping[str, object], value: object) -> object:
    """Our value for theirs, in whatever case; another value is its own."""
    wanted = word(value)
    return next((ours for theirs, ours in values.items() if word(theirs) == wanted), value)


def flat(values: Mapping[str, object], prefix: str = "") -> Values:
    """Dotted key → value; an empty mapping is a value."""
    flattened: Values = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping) and value:
            flattened |= flat(value, key)
        else:
            flattened[key] = value
    return flattened
