"""The page docs/reference/json.md, from the JSON Schemas of the results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftplan.report.documents import DOCUMENTS
from peftplan.report.schema import json_schema

INTRO = """\
# JSON

`--format json` prints one JSON value; `sweep` prints JSON Lines, one value per row. Bytes, counts and tokens are integers, and an
unknown value is `null`. `schema_version` stays 1 as long as fields are only added, so programs should ignore fields that they do
not know.

`peftplan schema NAME` prints the JSON Schema (draft 2020-12) of each value; the tests validate the commands against it."""


def json_page() -> str:
    """The whole page: a section for each document, a list of fields for each record, records that several share once."""
    parts = ["<!-- python -m tools.reference writes this page. -->", INTRO]
    described: set[str] = set()
    for name, document in DOCUMENTS.items():
        schema = json_schema(name)
        parts += [f"## {document.command}", schema["description"], f"The schema: `peftplan schema {name}`."]
        if "items" in schema:
            parts.append(f"A list of {reference(schema['items'])}.")
        else:
            parts.append("\n".join(fields(schema)))
        for record, definition in schema["$defs"].items():
            if record not in described:
                described.add(record)
                parts += [f"### {record}", definition["description"], "\n".join(fields(definition))]
    return "\n\n".join(parts) + "\n"


def fields(schema: dict[str, Any]) -> Iterator[str]:
    """A bullet for each field."""
    for name, field in schema["properties"].items():
        optional = "" if name in schema["required"] else "optional, "
        text = f": {field['description'].replace('<', '&lt;')}" if "description" in field else ""
        yield f"- `{name}` ({optional}{kind(field)}){text}"


def kind(schema: dict[str, Any]) -> str:
    """A type in words: `integer or null`, `list of Line`."""
    match schema:
        case {"$ref": _}:
            return reference(schema)
        case {"enum": values}:
            return ", ".join(f"`{value}`" for value in values)
        case {"anyOf": choices}:
            return " or ".join(map(kind, choices))
        case {"type": "array", "items": items}:
            return f"list of {kind(items)}"
        case {"type": "object", "additionalProperties": values}:
            return f"object of {kind(values)}"
        case {"type": [*names]}:
            return " or ".join(names)
        case {"type": str(name)}:
            return name
        case _:
            return "any value"


def reference(schema: dict[str, Any]) -> str:
    """A link to a record's section."""
    name = schema["$ref"].rpartition("/")[2]
    return f"[{name}](#{name.lower()})"
