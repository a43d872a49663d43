"""How text reaches stdout in each format: rows of a table, remarks, and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from peftplan.report import tabular
from peftplan.report.tabular import Column

Cells = Sequence[Sequence[str | int | None]]
Facts = Sequence[Mapping[str, object]]


def rows(
    columns: Sequence[Column],
    cells: Cells,
    facts: Facts,
    *,
    fmt: str,
    above: str | None = None,
    below: str | None = None,
    instead: Sequence[str] = (),
) -> None:
    """One list in the asked format: cells for people with lines above and below, facts for programs.

    In Markdown the first line above is a title. `instead`: lines below a table whose wide columns found no room.

    An empty list is no table: a CSV is empty then, and people read the line below.
    """
    if fmt == "json":
        as_json(facts)
    elif not cells:
        print(end=f"{below}\n" if below and fmt != "csv" else "")
    elif fmt == "csv":
        tabular.write_csv(facts, sys.stdout)
    elif fmt == "markdown":
        from peftplan.report import markdown

        title, *lines = map(markdown.plain, (above or "").splitlines() or [""])
        table = markdown.table([column.header for column in columns], map(tabular.texts, cells))
        parts = [f"## {title}" if title else "", *lines, table, *map(markdown.plain, (below or "").splitlines())]
        print("\n\n".join(filter(None, parts)))
    else:
        from peftplan.report import terminal

        terminal.rows(columns, map(tabular.texts, cells), above=above, below=below, instead=instead)


def remarks(lines: Sequence[str], *, fmt: str) -> None:
    """Lines of text: folded to the terminal, or as paragraphs."""
    if fmt == "markdown":
        print("\n\n".join(map(in_markdown, lines)))
    else:
        from peftplan.report import screen

        print(*(screen.folded(line, screen.width()) for line in lines), sep="\n")


def in_markdown(text: str) -> str:
    """A line of text in Markdown."""
    from peftplan.report import markdown

    return markdown.plain(text)


def as_json(value: object) -> None:
    """A document on stdout, indented. Characters that no terminal shows are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(text if text.isprintable() else "".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text))


@runtime_checkable
class Record(Protocol):
    """A named tuple."""

    def _asdict(self) -> dict[str, object]: ...


def fields(item: Record) -> dict[str, object]:
    """A named tuple as JSON-able values."""
    return {name: plain(value) for name, value in item._asdict().items()}


def plain(value: object) -> object:
    """A value of lists and dicts alone, as JSON takes it."""
    if isinstance(value, Record):
        return fields(value)
    if isinstance(value, (tuple, list, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return value
