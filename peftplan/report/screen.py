"""Plain lines for a terminal or a pipe, without rich: width, colour, the letters that its encoding has, and wrapping."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Literal, NamedTuple

from peftplan.report.tabular import printable

NARROWEST = 80
"""A terminal with fewer columns breaks the lines itself."""
PIPE_WIDTH = 10_000
"""A pipe without COLUMNS has no width: nothing is folded, so that grep and awk see whole rows."""
INDENT = "  "
TIED = "\xa0"
"""A blank at which no line breaks."""
MEASURE = re.compile(r"(?<=\d) (?=(?:[KMGT]i?B|[BKMT]|bytes?|tokens?|blocks?|GPUs?|ms|s|%)(?!\w))")
"""The blank between a number and its unit, as `format_bytes` and `format_count` write them."""

Colour = Literal["green", "yellow", "red", "bold"]
SHADES: dict[Colour, int] = {"green": 28, "yellow": 136, "red": 160}
"""Of the 256 colours: dark enough for a white screen, bright enough for a black one. Of the first 16 a white one hides yellow."""
CODES: dict[Colour, str] = {"bold": "\x1b[1m", **{colour: f"\x1b[38;5;{number}m" for colour, number in SHADES.items()}}
PLAIN = "\x1b[0m"


class Part(NamedTuple):
    """Text in one colour."""

    text: str
    colour: Colour | None = None


Row = tuple[Part, ...]
"""One line on the screen."""


class Glyphs(NamedTuple):
    """The letters that words alone do not need: marks of verdicts, shades of a bar, the edge of a card, what parts items."""

    fits: str
    tight: str
    fails: str
    unknown: str
    shades: str
    free: str
    edge: str
    dot: str
    step: str


class Screen(NamedTuple):
    """What lines are written for."""

    columns: int
    glyphs: Glyphs


UNICODE = Glyphs(fits="✓", tight="!", fails="✗", unknown="?", shades="█▓▒░", free="·", edge="│", dot=" · ", step="→")
ASCII = Glyphs(fits="+", tight="!", fails="x", unknown="?", shades="#=%:", free=".", edge="|", dot=", ", step="-")


def width() -> int:
    """Columns of the terminal, or of COLUMNS; a pipe has no end."""
    piped = not sys.stdout.isatty() and not os.environ.get("COLUMNS")
    return PIPE_WIDTH if piped else max(shutil.get_terminal_size((NARROWEST, 24)).columns, NARROWEST)


def glyphs() -> Glyphs:
    """The letters that stdout's encoding has."""
    try:
        "".join(UNICODE).encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


def coloured() -> bool:
    """Whether stdout shows colours: a terminal does, unless NO_COLOR says otherwise."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    old_console = sys.platform == "win32" and not os.environ.get("WT_SESSION")
    return bool(os.environ.get("FORCE_COLOR")) or (sys.stdout.isatty() and not old_console)


def show(rows: Iterable[Row]) -> None:
    """Print lines."""
    paint = coloured()
    for row in rows:
        texts = (f"{CODES[part.colour]}{part.text}{PLAIN}" if paint and part.colour else part.text for part in row)
        line = "".join(texts)
        print(line if paint else line.rstrip())


def tied(text: str, blank: str = TIED) -> str:
    """Text whose numbers stay beside their units: `blank` takes the place of the blank between them."""
    return MEASURE.sub(blank, text)


def folded(text: str, columns: int) -> str:
    """Lines of text as paragraphs of at most so many columns; what follows a line's first row stands two blanks further in."""
    rows: list[Row] = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip(" "))) + INDENT
        rows += wrapped(line, columns, indent=indent) or [()]
    return "\n".join("".join(part.text for part in row) for row in rows)


def wrapped(text: str, columns: int, *, colour: Colour | None = None, indent: str = INDENT) -> list[Row]:
    """Text in lines of at most so many columns, those after the first indented; words break only where they are longer."""
    text = "".join(letter if letter == TIED else printable(letter) for letter in text)
    lines = textwrap.wrap(tied(text), columns, subsequent_indent=indent, break_on_hyphens=False)
    return [(Part(line.replace(TIED, " "), colour),) for line in lines]


def flowing(items: Iterable[str], columns: int, *, between: str, before: str = "") -> list[Row]:
    """Items side by side, as many as a line takes; an item breaks only, between words, where it is longer than a line."""
    glue = between.rstrip().replace(" ", TIED) + " "
    unbroken = (item.replace(" ", TIED) if len(item) + len(INDENT + between.rstrip()) <= columns else item for item in items)
    return wrapped(before + glue.join(unbroken), columns)
