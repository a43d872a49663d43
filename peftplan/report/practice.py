"""Advice from practice as text: a paragraph per recommendation under its topic, apart from computed numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from peftplan.planning.practice import Practice
from peftplan.report.screen import INDENT, Part, Row, wrapped

NO_ESTIMATE = "Advice published by others; none of peftplan's numbers depend on it."


def lines(rows: Sequence[Practice], columns: int) -> Iterator[Row]:
    """What is recommended, and by whom."""
    yield from wrapped(NO_ESTIMATE, columns)
    for topic, group in groupby(rows, key=lambda row: row.topic):
        yield ()
        yield (Part(topic, "bold"),)
        for row in group:
            yield from _hanging(f"{', '.join(row.methods)}: {row.advice}", columns, indent=INDENT)
            yield from _hanging(f"{row.source}, {row.url}", columns, indent=INDENT * 2)


def _hanging(text: str, columns: int, *, indent: str) -> Iterator[Row]:
    for line in wrapped(text, columns - len(indent), indent=""):
        yield (Part(indent), *line)


def facts(rows: Sequence[Practice]) -> list[dict[str, object]]:
    """One record per recommendation."""
    return [{**row._asdict(), "methods": list(row.methods)} for row in rows]
