"""The rows of a sweep for Arrow: one schema for all of them, whatever the first rows leave open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Protocol

from peftplan.errors import MissingExtraError
from peftplan.planning.axes import Values
from peftplan.planning.sweep_points import Chunk

try:
    import pyarrow
except ImportError:
    raise MissingExtraError("pyarrow", "sweep") from None

TEXTS = ("model", "method", "gpu", "verdict", "decided_by", "error")
"""Columns of text; an option has the type of its values, and all others are whole numbers."""
TYPES: Mapping[type, pyarrow.DataType] = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}


class Rows(Protocol):
    """A sweep: the names of its columns, the values of an option, and its rows as columns, chunk by chunk."""

    columns: tuple[str, ...]

    def values_of(self, column: str) -> Values: ...
    def chunks(self) -> Iterator[Chunk]: ...


def schema(rows: Rows) -> pyarrow.Schema:
    """The columns and their types."""

    def of(name: str) -> pyarrow.DataType:
        if name in TEXTS:
            return pyarrow.string()
        kinds = {type(value) for value in rows.values_of(name) if value is not None} or {int}
        return TYPES.get(kinds.pop(), pyarrow.string()) if len(kinds) == 1 else pyarrow.string()

    return pyarrow.schema([(name, of(name)) for name in rows.columns])


def batch(chunk: Chunk, of: pyarrow.Schema) -> pyarrow.RecordBatch:
    """A chunk of rows."""
    columns = {
        name: list(map(_text, values)) if pyarrow.types.is_string(of.field(name).type) else values
        for name, values in chunk.items()
    }
    return pyarrow.RecordBatch.from_pydict(columns, schema=of)


def reader(rows: Rows) -> pyarrow.RecordBatchReader:
    """All rows, evaluated while they are read."""
    of = schema(rows)

    def batches() -> Iterator[pyarrow.RecordBatch]:
        for chunk in rows.chunks():
            yield batch(chunk, of)

    return pyarrow.RecordBatchReader.from_batches(of, batches())


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)
