"""Rich tables for the terminal: readable at 80 columns and without colour. A pipe gets every column, one line per row."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Column as TableColumn
from rich.table import Table
from rich.text import Text

from peftplan.report.screen import NARROWEST, PIPE_WIDTH, folded, tied
from peftplan.report.tabular import Column, printable

if TYPE_CHECKING:
    from rich.console import HighlighterType, JustifyMethod, OverflowMethod
    from rich.style import Style

WIDE = 110
"""Terminals of at least this many columns show the wide columns of a table too."""
GAP = 2
"""Blanks between columns."""
READABLE = 10
"""Letters that a column of words keeps beside long names."""
LONGEST_WORD = 12
"""Letters of a word that is not broken beside them, such as *activations*."""
NO_BREAK = "\ue000"
"""Stands for a blank between a number and its unit. Rich would break a line at any blank, at a non-breaking one too."""


class _Printable(Console):
    """A console on which no name of a file or a config moves the cursor or changes colours, and no number loses its unit."""

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        emoji: bool | None = None,
        markup: bool | None = None,
        highlight: bool | None = None,
        highlighter: HighlighterType | None = None,
    ) -> Text:
        return super().render_str(
            tied(printable(text), NO_BREAK),
            style=style,
            justify=justify,
            overflow=overflow,
            emoji=emoji,
            markup=markup,
            highlight=highlight,
            highlighter=highlighter,
        )

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            renderable = renderable.copy()
            renderable.plain = tied(renderable.plain, NO_BREAK)
        for segment in super().render(renderable, options):
            yield segment._replace(text=segment.text.replace(NO_BREAK, " "))


def console() -> Console:
    """Where text goes: stdout, with markup, highlighting and emoji off."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    out = _Printable(highlight=False, markup=False, emoji=False, width=PIPE_WIDTH if piped else None)
    out.width = max(out.width, NARROWEST)
    return out


def show(out: Console, parts: Iterable[RenderableType]) -> None:
    """Print to the console, texts as paragraphs; what is no terminal gets no colour and no trailing blanks."""
    parts = [folded(part, out.width) if isinstance(part, str) else part for part in parts]
    if out.is_terminal:
        for part in parts:
            out.print(part)
        return
    with out.capture() as captured:
        for part in parts:
            out.print(part)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def rows(
    columns: Sequence[Column],
    cells: Iterable[Sequence[str]],
    *,
    above: str | None,
    below: str | None,
    instead: Sequence[str] = (),
) -> None:
    """One table, with a line above and a line below it where there is something to say; `instead` of wide columns: more lines."""
    out = console()
    chosen = [index for index, column in enumerate(columns) if not column.wide or out.width >= WIDE]
    grid = table(*(columns[index] for index in chosen))
    for row in cells:
        grid.add_row(*(row[index] for index in chosen))
    left_out = ("", *instead) if instead and len(chosen) < len(columns) else ()
    show(out, (*((above, "") if above else ()), fitted(grid, out.width), *left_out, *(("", below) if below else ())))


def table(*columns: Column, footer: Sequence[str] = (), header: bool = True) -> Table:
    """A plain table. Names and numbers (the first column, and those to the right) never wrap where there is room for them."""
    styled = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_footer=bool(footer), collapse_padding=True)
    styled.show_header = header
    for index, column in enumerate(columns):
        styled.add_column(
            column.header,
            justify="right" if column.right else "left",
            overflow="fold",
            footer=footer[index] if footer else "",
            no_wrap=column.right or column.whole or index == 0,
        )
    return styled


def fitted(table: Table, width: int) -> Table:
    """The table; its names fold where they and the numbers leave the words no room, since a number without its end is another."""
    room = width
    names, *others = table.columns
    for column in others:
        longest = _longest(column)
        if not column.no_wrap:
            longest = column.min_width = min(longest, max(READABLE, min(_longest_word(column), LONGEST_WORD)))
        room -= GAP + longest
    if _longest(names) > room:
        names.no_wrap, names.width = False, room
        names._cells = [_folded(cell, room) if isinstance(cell, str) else cell for cell in names.cells]
    return table


def _folded(names: str, room: int) -> str:
    """Names in lines of at most so many letters: an option stays beside its value, and a module's name breaks behind a dot."""
    lines: list[str] = []
    for name in names.split("\n"):
        lines.append(" " * (len(name) - len(name.lstrip())))
        for word in re.findall(r"--\S+ (?!--)\S+|\S+", name):
            joined = f"{lines[-1]} {word}" if lines[-1].strip() else f"{lines[-1]}{word}"
            if len(joined) <= room or not lines[-1].strip():
                lines[-1] = joined
            else:
                lines.append(word)
            while len(lines[-1]) > room and (end := lines[-1].rfind(".", 0, room) + 1):
                lines[-1:] = [lines[-1][:end], lines[-1][end:]]
    return "\n".join(lines)


def _longest(column: TableColumn) -> int:
    """Letters of the longest line of a column."""
    return max(len(line) for cell in (column.header, *column.cells, column.footer) for line in str(cell).split("\n"))


def _longest_word(column: TableColumn) -> int:
    """Letters of the longest word of a column."""
    return max(len(word) for cell in (column.header, *column.cells, column.footer) for word in ("", *str(cell).split()))
