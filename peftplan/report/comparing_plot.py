"""A comparison as a picture: each method's peak as a bar of categories, cards as lines (matplotlib, extra `plot`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from peftplan.errors import InputError, MissingExtraError, UnknownNameError
from peftplan.files import replacing
from peftplan.ledger import EVERY_CATEGORY
from peftplan.planning.compare import Comparison
from peftplan.report.colours import COLOURS
from peftplan.report.comparing import label
from peftplan.units import GIB, format_bytes

SUFFIXES = (".png", ".svg")
WIDTH, ROW = 7.0, 0.5
"""Inches of the figure, and of one bar: narrow, so that its words can be read on a phone."""
ROW_OF_NAMES = 11
"""Points between names of cards that stand one above the other, where they would overlap in one row."""
LETTER = 0.015
"""Width of a letter of them, as a share of the figure's."""
FARTHEST = 1.4
"""Times the longest bar at which a card still has its line."""


def check(path: str) -> None:
    """Ask before any work is done. Raises InputError for what is no such file, MissingExtraError without matplotlib."""
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise UnknownNameError("--plot", path, SUFFIXES)
    if not file.parent.is_dir() or file.is_dir():
        raise InputError("--plot", path, "accepted: a file in an existing folder")
    if find_spec("matplotlib") is None:
        raise MissingExtraError("--plot", "plot")


def write(result: Comparison, path: str) -> None:
    """Write the figure; the file appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = {label(row): row for row in reversed(result.rows) if row.by_category}
    cards = {row.gpu: row.usable_bytes for row in result.rows if row.gpu and row.usable_bytes}
    figure = Figure(figsize=(WIDTH, 2.1 + ROW * len(methods)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    left = dict.fromkeys(methods, 0.0)
    for category in EVERY_CATEGORY:
        sizes = {name: (row.by_category or {}).get(category, 0) / GIB for name, row in methods.items()}
        if any(sizes.values()):
            axes.barh(
                list(sizes),
                list(sizes.values()),
                left=list(left.values()),
                color=COLOURS[category],
                label=category.replace("_", " "),
            )
            left = {name: left[name] + size for name, size in sizes.items()}
    longest = max(left.values(), default=1.0)
    # Beside the method's name, where no line of a card can cross the number.
    words = [f"{name}\n{format_bytes(row.peak_allocated or 0)}" for name, row in methods.items()]
    axes.set_yticks(range(len(words)), words, fontsize=9)
    cards_near = {card: usable / GIB for card, usable in cards.items() if usable / GIB <= FARTHEST * longest}
    widest = 1.15 * max(longest, *cards_near.values(), 0.0)
    rows = _rows(cards_near, widest)
    for card, usable in cards_near.items():
        axes.axvline(usable, color="black", linewidth=0.8, linestyle="--")
        offset = (0, 2 + ROW_OF_NAMES * rows[card])
        top = axes.get_xaxis_transform()
        axes.annotate(card, (usable, 1), offset, xycoords=top, textcoords="offset points", ha="center", va="bottom", fontsize=9)
    axes.set_xlim(0, widest)
    axes.set_xlabel("\n".join(("GiB allocated at the peak", *_of_lines(cards_near, cards))))
    title = f"{result.model}: peak of a training step by {'strategy' if result.of_ways else 'method'}"
    axes.set_title(title, loc="left", pad=6 + ROW_OF_NAMES * (1 + max(rows.values(), default=0)))
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with replacing(path, field="--plot") as file:
        figure.savefig(file, format=Path(path).suffix[1:], metadata={} if path.endswith(".svg") else {"Software": None})


def _rows(cards: Mapping[str, float], widest: float) -> dict[str, int]:
    """Card → the row of its name, counted upwards: the lowest in which it does not touch another."""
    rows: dict[str, int] = {}
    ends: list[float] = []
    for card, usable in sorted(cards.items(), key=lambda item: item[1]):
        half = LETTER * widest * (len(card) + 1) / 2
        row = next((row for row, end in enumerate(ends) if end <= usable - half), len(ends))
        ends[row : row + 1] = [usable + half]
        rows[card] = row
    return rows


def _of_lines(cards_near: Collection[str], cards: Mapping[str, int]) -> Iterator[str]:
    """What the dashed lines are, and the cards whose lines lie to the right of the figure."""
    if cards_near:
        yield "dashed: what a program can get of the card"
    if beyond := [f"{card} {format_bytes(usable)}" for card, usable in cards.items() if card not in cards_near]:
        yield f"to the right of it: {', '.join(beyond)}"
