"""JSON Schema of what the commands print with `--format json`, generated from the types of the results."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from typing_extensions import NotRequired

from peftplan.errors import UnknownNameError
from peftplan.report.documents import DOCUMENTS, SHAPES, Shape
from peftplan.results.estimate import SCHEMA_VERSION

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCALARS: dict[object, str] = {NoneType: "null", bool: "boolean", int: "integer", float: "number", str: "string"}
Schema: TypeAlias = dict[str, object]
"""A JSON Schema, or a part of one."""


def json_schema(name: str, *, closed: bool = False) -> Schema:
    """The JSON Schema (draft 2020-12) of a document of `DOCUMENTS`; a `closed` one refuses fields that it does not know.

    Fields are only added while `schema_version` stays 1, so a program should read an open one. Raises UnknownNameError.
    """
    if name not in DOCUMENTS:
        raise UnknownNameError("NAME", name, DOCUMENTS)
    document = DOCUMENTS[name]
    definitions: dict[str, Schema] = {}
    root = schema_of(document.type, definitions, closed=closed)
    if "$ref" in root:
        root = definitions.pop(str(root["$ref"]).rpartition("/")[2])
    return {
        "$schema": DIALECT,
        "$id": f"urn:peftplan:schema:{name}:{SCHEMA_VERSION}",
        "title": name,
        "description": document.text,
        **root,
        "$defs": definitions,
    }


def schema_of(annotation: object, definitions: dict[str, Schema], *, closed: bool) -> Schema:
    """The schema of an annotation. Each record that it names gets one definition."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is NotRequired:
        return schema_of(arguments[0], definitions, closed=closed)
    if annotation in SCALARS:
        return {"type": SCALARS[annotation]}
    if annotation is object:
        return {}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, UnionType):
        return _any_of([schema_of(argument, definitions, closed=closed) for argument in arguments])
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        names = {"propertyNames": {"enum": list(get_args(arguments[0]))}} if get_origin(arguments[0]) is Literal else {}
        return {"type": "object", **names, "additionalProperties": schema_of(arguments[1], definitions, closed=closed)}
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return {"type": "array", "items": schema_of(arguments[0], definitions, closed=closed)}
    assert isinstance(annotation, type)
    name = SHAPES.get(annotation, Shape()).name or annotation.__name__.removesuffix("Document")
    if name not in definitions:
        definitions[name] = {}  # a record may hold others of its own
        definitions[name] |= record(annotation, definitions, closed=closed)
    return {"$ref": f"#/$defs/{name}"}


def _any_of(schemas: list[Schema]) -> Schema:
    """One of several; scalars are told apart by their type alone."""
    if all(schema.keys() == {"type"} for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    return {"anyOf": schemas}


def record(cls: type, definitions: dict[str, Schema], *, closed: bool) -> Schema:
    """An object with a record's fields (a named tuple, a typed dict or a dataclass), each with the string below it."""
    texts, shape = dict(field_texts(cls)), SHAPES.get(cls, Shape())
    hints = get_type_hints(cls, include_extras=True) | shape.added
    fields = {name: hint for name, hint in hints.items() if name not in shape.left_out}
    properties = {
        name: schema_of(hint, definitions, closed=closed) | ({"description": texts[name]} if name in texts else {})
        for name, hint in fields.items()
    }
    return {
        "type": "object",
        "description": " ".join((cls.__doc__ or "").split()),
        "properties": properties,
        "required": [name for name, hint in fields.items() if get_origin(hint) is not NotRequired],
        **({"additionalProperties": False} if closed else {}),
    }


def field_texts(cls: type) -> Iterator[tuple[str, str]]:
    """(field, the string below it) of a class and of the records that it extends."""
    for base in (*getattr(cls, "__orig_bases__", ()), cls):
        if not inspect.isclass(base) or base.__module__.partition(".")[0] != __name__.partition(".")[0]:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, tree.body[1:], strict=False):
            match node, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    yield name, " ".join(text.split())
                case _:
                    continue
