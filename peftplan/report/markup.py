"""HTML for notebooks: text, tables and bars, every text escaped, no script; colours that read on a light and a dark page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from peftplan.report.screen import Colour, Row, tied
from peftplan.report.tabular import Column, printable

STYLE = """
.peftplan{font-size:13px;line-height:1.45;max-width:960px;overflow-wrap:anywhere}
.peftplan p{margin:2px 0}
.peftplan b{font-weight:600}
.peftplan .bar{display:flex;height:14px;margin:4px 0;border-radius:3px;overflow:hidden;background:rgba(128,128,128,.22)}
.peftplan .bar i{display:block}
.peftplan .legend span{margin-right:12px;white-space:nowrap}
.peftplan .legend i{display:inline-block;width:10px;height:10px;margin-right:4px;border-radius:2px}
.peftplan table{border-collapse:collapse;margin:6px 0;font-size:13px;color:inherit;background:none}
.peftplan table th,.peftplan table td{padding:2px 12px 2px 0;border:0;border-bottom:1px solid rgba(128,128,128,.3);
text-align:left!important;vertical-align:top;background:none;color:inherit}
.peftplan table tr{background:none}
.peftplan table th{font-weight:600;border-bottom-color:rgba(128,128,128,.7)}
.peftplan table .n{text-align:right!important;font-variant-numeric:tabular-nums}
.peftplan table .k{white-space:nowrap}
.peftplan .scroll{overflow-x:auto;overflow-wrap:normal}
.peftplan .scroll td:not(.k){min-width:11em}
.peftplan .scroll td.l:not(.k){min-width:32em}
.peftplan details{margin:4px 0}
.peftplan summary{cursor:pointer;opacity:.75}
.peftplan .o{white-space:nowrap}
.peftplan .green{color:#2f9e44}.peftplan .yellow{color:#d9730d}.peftplan .red{color:#e5484d}
""".replace("\n", "")
"""Only names inside `.peftplan`; greys are see-through, so that the page's own background decides."""


_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+(?: [a-z0-9][\w-]*)?")
SHORT = 24
"""Letters of a cell that is never folded."""
LONG = 80
"""Letters of a cell that gets a wide column, so that its row is not many lines high."""


class Html(str):
    """Text that is HTML already; every other text is escaped."""

    __slots__ = ()


class Stretch(NamedTuple):
    """A part of a bar: its colour, how much it holds, and what a pointer over it reads."""

    colour: str
    size: int
    title: str


def text(value: str) -> Html:
    """Text as HTML, whose options and their values are not broken at hyphens; what is HTML already stays."""
    return (
        value if isinstance(value, Html) else Html(_OPTION.sub(r'<span class="o">\g<0></span>', escape(tied(printable(value)))))
    )


def page(*parts: Html) -> str:
    """One output of a notebook."""
    return f'<style>{STYLE}</style><div class="peftplan">{"".join(parts)}</div>'


def paragraph(value: str, *, strong: bool = False) -> Html:
    """A line of text."""
    return Html(f"<p><b>{text(value)}</b></p>" if strong else f"<p>{text(value)}</p>")


def coloured(value: str, colour: Colour | None) -> Html:
    """Text with the colour of a verdict."""
    return text(value) if colour is None else Html(f'<span class="{colour}">{text(value)}</span>')


def row(line: Row) -> Html:
    """A line of the terminal. Of a coloured one only the mark before it is coloured: words read on any page."""
    marked = "".join(
        text(part.text) if part.colour is None else coloured(part.text[:1], part.colour) + text(part.text[1:]) for part in line
    )
    return Html(f"<p>{marked}</p>")


def bar(parts: Iterable[Stretch], *, scale: int) -> Html:
    """Stretches side by side; `scale` is the size of the whole bar."""
    stretches = (
        f'<i style="width:{100 * part.size / max(scale, 1):.3f}%;background:{part.colour}" title="{escape(part.title)}"></i>'
        for part in parts
    )
    return Html(f'<div class="bar">{"".join(stretches)}</div>')


def legend(parts: Iterable[Stretch]) -> Html:
    """What the colours of a bar mean."""
    items = (f'<span><i style="background:{part.colour}"></i>{text(part.title)}</span>' for part in parts)
    return Html(f'<p class="legend">{"".join(items)}</p>')


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> Html:
    """A table that scrolls alone where it is wider than the page; numbers stand to the right, and no short cell folds."""
    head = "".join(f"<th{_kind(column, column.header)}>{text(column.header)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td{_kind(column, cell)}>{text(cell)}</td>' for column, cell in zip(columns, cells, strict=True))}</tr>"
        for cells in rows
    )
    return Html(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def _kind(column: Column, cell: str) -> str:
    short, long = isinstance(cell, Html) or len(cell) <= SHORT, len(cell) > LONG
    names = [*(["n"] if column.right else []), *(["k"] if short else ["l"] if long else [])]
    return f' class="{" ".join(names)}"' if names else ""


def folded(title: str, *parts: Html) -> Html:
    """Parts behind a line that opens them."""
    return Html(f"<details><summary>{text(title)}</summary>{''.join(parts)}</details>")
