"""Values of a program's expressions, from its syntax tree; nothing runs. What only the program knows stays `<text>`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from typing import cast

from peftplan.job.configs.documents import Values
from peftplan.job.configs.instances import MOST_VALUES, UNKNOWN, Instance, one_of, plain, size

MOST_OF_A_TEXT = 40
LONGEST = 10_000
"""The longest text that an expression makes."""
LARGEST = 10**12
"""The largest number that arithmetic makes."""
ARITHMETIC: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
}  # fmt: skip
COMPARED: Mapping[type[ast.cmpop], Callable[..., bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.In: lambda item, items: item in items, ast.NotIn: lambda item, items: item not in items,
}  # fmt: skip
CASTS: Mapping[str, Callable[..., object]] = {
    "int": int, "float": float, "str": str, "bool": bool, "list": list, "tuple": list, "len": len,
}  # fmt: skip
KINDS: Mapping[str, type] = {"str": str, "dict": dict, "bool": bool}
"""Classes of which a value is surely one, or surely not: lists stand for tuples too."""
DTYPE = re.compile(r"<torch\.(bfloat16|half|double|bool|u?int\d+|float\w*)>")
FLOATING = re.compile(r"<torch\.(bfloat16|half|double|float\w*)>")
NAMED_TWICE = {"half": "<torch.float16>", "float": "<torch.float32>", "double": "<torch.float64>"}
"""Other names that torch has for a dtype."""
BF16 = ("is_bfloat16_supported", "is_bf16_supported")
"""Functions of torch and Unsloth that ask whether the card computes in bf16, as each does from compute capability 8.0 on."""
CAPABLE = re.compile(r"torch\.cuda\.get_device_capability\((0|device)?\)(\[0\] >= 8| >= \(8, 0\))")
"""The same question, asked of the compute capability."""

MOST_GPUS = 16
"""GPUs of one node, at most."""
COPIES = ("dict", "copy.copy", "copy.deepcopy")
"""Functions that copy a dictionary; so does its method `copy`."""


class Expressions:
    """Names and attributes that a program gave plain values, and the values of expressions made of them."""

    def __init__(self) -> None:
        self.names: Values = {"__name__": "__main__"}
        self.function = ""
        """The function that is being read."""
        self.attributes: Values = {}
        """Last name of an attribute → its value: fields of classes, `self.name`, arguments of the command line."""
        self.owners: dict[str, tuple[str, str]] = {}
        """Of them → what it was last written to, `args`, and in which function."""
        self.values_of: dict[str, set[str]] = {}
        """Of them → all values that the program gives an attribute of this name."""
        self.arguments: dict[str, str] = {}
        """Of them, arguments of the command line → their option."""
        self.origins: dict[str, frozenset[str]] = {}
        """Name → the options of the command line whose defaults its value holds."""
        self.by_default: set[str] = set()
        """Options whose default a value took since this was last emptied."""
        self.aliases: dict[str, str] = {}
        """Name → another name of the same class or function; empty where the program gives it several."""
        self.variables: set[str] = set()
        """Variables of the environment that the program sets itself, or the command that runs it."""
        self.keys_unseen: frozenset[object] = frozenset()
        """Keys whose values are unknown in every dictionary: an earlier reading saw them set in one it could not identify."""

    def _keep(self, name: str, value: object, by_default: Collection[str] = ()) -> None:
        """Let a name stand for a value of moderate size that is plain, or that holds some that are."""
        if size(value) > MOST_VALUES or (isinstance(value, str) and (len(value) > LONGEST or not plain(value))):
            self.names.pop(name, None)
            return
        self.names[name] = value
        self.origins[name] = frozenset(by_default)

    def _rename(self, name: str, other: str) -> None:
        """Let a name stand for a class or function."""
        self.aliases[name] = other if self.aliases.get(name, other) == other else ""

    def name_of(self, function: ast.expr) -> str:
        """The name of what is called, as its library or the program defines it."""
        name = dotted(function)
        first, dot, rest = name.partition(".")
        return self.aliases.get(name) or (self.aliases.get(first) or first) + dot + rest

    def fresh(self, node: ast.expr) -> object:
        """The value of an expression, and in `by_default` the options behind it alone."""
        self.by_default = set()
        return self.value(node)

    def value(self, node: ast.expr) -> object:
        """A plain value, or `<text>` of what only the program knows."""
        try:
            literal = ast.literal_eval(node)
            if isinstance(literal, set):
                return sorted(literal, key=str)
            return text_of(node) if isinstance(literal, int) and abs(literal) >= LARGEST**2 else literal
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            pass
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self._inside(each) for each in node.elts]
        if isinstance(node, ast.Dict):
            return self._items(node)
        try:
            value = self._plain(node)
        except (ArithmeticError, ValueError, TypeError, RecursionError):
            value = node
        return text_of(node) if value is node else value

    def _inside(self, node: ast.expr) -> object:
        value = self.value(node)
        return text_of(node) if isinstance(value, Instance) else value

    def _items(self, node: ast.Dict) -> object:
        """A dictionary whose keys are texts; `<text>` where others decide what it holds."""
        items: Values = {}
        for key, value in zip(node.keys, node.values, strict=True):
            name, inside = None if key is None else self.value(key), self._inside(value)
            if key is None and isinstance(inside, dict):
                items |= self._spread(inside)
            elif isinstance(name, str) and plain(name):
                items[name] = inside
            else:
                return text_of(node)
        return items

    def _spread(self, items: Mapping[str, object]) -> Values:
        """What `**items` hands over."""
        return {key: f"<{key}>" if key in self.keys_unseen else value for key, value in items.items()}

    def _plain(self, node: ast.expr) -> object:
        """The value of an expression; the expression itself where it is not plain."""
        if isinstance(node, ast.Name):
            self.by_default |= self.origins.get(node.id, frozenset()) if node.id in self.names else frozenset()
            return self.names.get(node.id, node)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Subscript):
            return self._item(self.value(node.value), self.value(node.slice), node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.DictComp):
            return self._of_gpus(node) or self._filtered(node)
        if isinstance(node, ast.IfExp):
            chosen = self._truth(node.test)
            if chosen is None:
                one = one_of([self.value(node.body), self.value(node.orelse)])
                return node if one is UNKNOWN else one
            return self.value(node.body if chosen else node.orelse)
        if isinstance(node, ast.BoolOp):
            return self._either(node)
        if isinstance(node, ast.JoinedStr):
            if any(isinstance(each, ast.FormattedValue) and (each.format_spec or each.conversion > 0) for each in node.values):
                return node
            parts = [self.value(each.value if isinstance(each, ast.FormattedValue) else each) for each in node.values]
            known = all(isinstance(each, (str, int)) and plain(each) for each in parts)
            text = "".join(map(str, parts)) if known else ""
            return text if known and len(text) <= LONGEST else node
        if isinstance(node, ast.BinOp):
            left, right = self.value(node.left), self.value(node.right)
            if _is_number(left) and _is_number(right) and type(node.op) in ARITHMETIC:
                number = ARITHMETIC[type(node.op)](cast("float", left), cast("float", right))
                return number if abs(number) < LARGEST else node
            if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
                return left + right
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
            left, right = self.value(node.left), self.value(node.comparators[0])
            if plain(left) and plain(right):
                return COMPARED[type(node.ops[0])](left, right)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            operand = self.value(node.operand)
            return not operand if plain(operand) and not _is_flag_of_torch(operand) else node
        return node

    def _of_gpus(self, node: ast.DictComp) -> dict[object, object] | None:
        """`{i: "80GB" for i in range(gpus)}`: a size for each GPU, of which there is one where the program counts them."""
        loop, size = node.generators[0], self.value(node.value)
        if len(node.generators) > 1 or loop.ifs or ast.unparse(loop.target) != ast.unparse(node.key):
            return None
        if not (isinstance(loop.iter, ast.Call) and ast.unparse(loop.iter.func) == "range" and len(loop.iter.args) == 1):
            return None
        count = self.value(loop.iter.args[0])
        sizes = isinstance(size, str) and re.fullmatch(r"[0-9.]+ *[KMG]i?B", size)
        return dict.fromkeys(range(min(count, MOST_GPUS) if isinstance(count, int) else 1), size) if sizes else None

    def _filtered(self, node: ast.DictComp) -> object:
        """`{k: v for k, v in items.items() if k != "x"}`: items whose keys pass the conditions."""
        loop, names = node.generators[0], [ast.unparse(node.key), ast.unparse(node.value)]
        of, is_items = loop.iter, isinstance(loop.iter, ast.Call) and ast.unparse(loop.iter.func).endswith(".items")
        if len(node.generators) > 1 or not is_items or ast.unparse(loop.target).strip("()") != ", ".join(names):
            return node
        items = self.value(cast("ast.Attribute", cast("ast.Call", of).func).value)
        if not isinstance(items, dict) or isinstance(items, Instance) or self.keys_unseen & items.keys():
            return node
        before, kept = dict(self.names), {}
        for key, value in items.items():
            self.names |= {names[0]: key, names[1]: value}
            holds = [self._truth(each) for each in loop.ifs]
            if None in holds:
                self.names = before
                return node
            if all(holds):
                kept[key] = value
        self.names = before
        return kept

    def _attribute(self, node: ast.Attribute) -> object:
        owner = self.value(node.value)
        if isinstance(owner, dict):
            return _known(owner.get(node.attr), node) if isinstance(owner, Instance) and node.attr in owner else node
        name, of = node.attr, ast.unparse(node.value)[:200]
        if of == "torch" and name in NAMED_TWICE:
            return NAMED_TWICE[name]
        if name == "is_floating_point" and isinstance(owner, str) and DTYPE.fullmatch(owner):
            return FLOATING.fullmatch(owner) is not None
        if of.partition(".")[0] == "torch" or name not in self.attributes or isinstance(self.names.get(_root(of)), Instance):
            return node
        if len(self.values_of.get(name, ())) > 1 and self.owners[name] != (of, self.function):
            return node
        if name in self.arguments:
            self.by_default.add(self.arguments[name])
        return _known(self.attributes[name], node)

    def _item(self, owner: object, key: object, node: ast.expr) -> object:
        if isinstance(owner, dict) and not isinstance(owner, Instance) and isinstance(key, (str, int)):
            return node if key in self.keys_unseen else owner.get(key, node)
        if isinstance(owner, list) and isinstance(key, int) and -len(owner) <= key < len(owner):
            return owner[key]
        return node

    def _call(self, node: ast.Call) -> object:
        """The value of a call that only picks or converts one."""
        called = self.name_of(node.func)
        values = [self.value(each) for each in node.args]
        if called.endswith(("cuda.is_available", "cuda.is_bf16_supported")):
            return True
        if called == "getattr" and len(values) > 1 and plain(values[1]) and ast.unparse(node.args[0]) == "torch":
            return f"<torch.{values[1]}>"
        if called in ("os.environ.get", "os.getenv", "environ.get", "getenv") and len(values) == 2:
            if str(values[0]) in self.variables:
                return node
            self.by_default.add(str(values[0]))
            return values[1]
        if called == "dict" and not values:
            keys = [None if each.arg is None else ast.Constant(each.arg) for each in node.keywords]
            return self._items(ast.Dict(list[ast.expr | None](keys), [each.value for each in node.keywords]))
        if called == "isinstance" and len(values) == 2 and plain(values[0]) and not isinstance(values[0], str):
            kind = KINDS.get(ast.unparse(node.args[1]))  # a text may stand for a path
            return node if kind is None else isinstance(values[0], kind)
        of = node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr == "copy" and not node.args else None
        copied = self.value(of) if of is not None else values[0] if called in COPIES and len(values) == 1 else None
        if isinstance(copied, dict) and not isinstance(copied, Instance) and not node.keywords:
            return deepcopy(copied) if called == "copy.deepcopy" else {**copied}
        if called in CASTS and len(values) == 1 and not node.keywords and plain(values[0]):
            cast_value = CASTS[called](values[0])
            return cast_value if not isinstance(cast_value, str) or len(cast_value) <= LONGEST else node
        if called in ("min", "max") and len(values) > 1 and not node.keywords and all(map(_is_number, values)):
            return (min if called == "min" else max)(cast("list[float]", values))
        if isinstance(node.func, ast.Attribute) and node.func.attr == "split" and len(values) < 2 and not node.keywords:
            text, by = self.value(node.func.value), values[0] if values else None
            return text.split(by) if isinstance(text, str) and plain(text) and plain(by) and isinstance(by, str | None) else node
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and values:
            owner, key = self.value(node.func.value), values[0]
            if not isinstance(owner, dict) or isinstance(owner, Instance) or not isinstance(key, (str, int)) or not plain(key):
                return node
            if key in self.keys_unseen:
                return node
            return owner[key] if key in owner else values[1] if len(values) == 2 else None
        return node

    def _either(self, node: ast.BoolOp) -> object:
        """`a or b`, `a and b`: the first that decides; unknown behind a part that only the program knows, but for an object."""
        value: object = node
        unknown = False
        for each in node.values:
            value, is_last = self.value(each), each is node.values[-1]
            if isinstance(value, Instance) and value.made_by and unknown and is_last:
                return Instance(value, made_by=value.made_by, is_copy=value.is_copy, may_be_none=True)
            if not plain(value):
                unknown = unknown or not is_last
            elif not unknown and bool(value) is isinstance(node.op, ast.Or):
                return value
        return node if unknown else value

    def _truth(self, test: ast.expr) -> bool | None:
        """Whether a condition holds; None where only the program knows."""
        text = ast.unparse(test)
        if text.rpartition(".")[2] in [f"{name}()" for name in BF16] or CAPABLE.fullmatch(text):
            return True
        if isinstance(test, ast.BoolOp):
            decides = isinstance(test.op, ast.Or)
            if any(self._truth(each) is decides for each in test.values):
                return decides
        value = self.value(test)
        return bool(value) if plain(value) and not _is_flag_of_torch(value) else None


def dotted(node: ast.expr) -> str:
    """The text of an expression; `module.name` without the detour of taking it apart."""
    parts: list[str] = []
    each = node
    while isinstance(each, ast.Attribute) and len(parts) < MOST_OF_A_TEXT:
        parts.append(each.attr)
        each = each.value
    return ".".join([each.id, *reversed(parts)])[:200] if isinstance(each, ast.Name) else ast.unparse(node)[:200]


def _known(value: object, node: ast.expr) -> object:
    """A value, or the expression itself where what it holds is unknown."""
    return node if isinstance(value, str) and not plain(value) else value


def _root(text: str) -> str:
    """The name that an expression begins with."""
    return re.split(r"\W", text, maxsplit=1)[0]


def _is_flag_of_torch(value: object) -> bool:
    """Whether a value is a name of torch other than that of a dtype: `torch.version.hip` may be true or not."""
    return isinstance(value, str) and value.startswith("<torch.") and DTYPE.fullmatch(value) is None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def text_of(node: ast.expr) -> str:
    """`<text>` of an expression, or `<call name>`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return "<number>"
    text = " ".join(ast.unparse(node).split())[:MOST_OF_A_TEXT]
    if not re.match("[A-Za-z_]", text):
        text = f"value {text}"
    return f"<call {ast.unparse(node.func)[:MOST_OF_A_TEXT]}>" if isinstance(node, ast.Call) else f"<{text}>"
