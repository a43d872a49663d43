"""Results as other programs show them: rows as a pandas DataFrame, HTML for notebooks. Imports happen on use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from peftplan.errors import PeftplanError

if TYPE_CHECKING:
    from pandas import DataFrame

Record = TypeVar("Record", bound=NamedTuple)


def dataframe(rows: Sequence[Mapping[str, object]]) -> DataFrame:
    """One row per record. Raises PeftplanError where pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise PeftplanError("to_dataframe needs pandas: pip install pandas") from None
    return pandas.DataFrame.from_records([dict(row) for row in rows])


def as_html(result: object) -> str:
    """A result as a notebook shows it. Text is made above results, so the package itself is asked (`report.notebook`)."""
    markup: str = import_module("peftplan").as_html(result)
    return markup


class Listing(list[Record], Generic[Record]):
    """A list of small records that becomes a table on request."""

    def records(self) -> list[dict[str, object]]:
        """Rows of plain values, which pandas and polars accept."""
        return [record._asdict() for record in self]

    def to_dataframe(self) -> DataFrame:
        """The rows as a pandas DataFrame."""
        return dataframe(self.records())

    def _repr_html_(self) -> str:
        return as_html(self)
