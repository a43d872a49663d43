"""A sweep as a map of batch × sequence: colour is what tensors request, lines are where cards end (matplotlib, extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peftplan.errors import InputError, MissingExtraError, RefusedError, UnknownNameError
from peftplan.files import replacing
from peftplan.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

    from peftplan.planning.sweep import Sweep
    from peftplan.planning.sweep_points import Chunk

SUFFIXES = (".png", ".svg")
MOST_PANELS, MOST_CELLS = 6, 40_000
"""Maps in one figure, and points in one map."""
ACROSS, DOWN = "seq_len", "batch_size"
WIDTH, HEIGHT = 6.4, 4.2
"""Inches of a map."""
COLOURS = ("#d62728", "#000000", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
"""Of the cards' lines, readable on the map's colours."""
THINNEST, THICKER = 1.8, 2.2
"""Points: the last card's solid line, and how much wider each earlier one is, so that lines on one another are all seen."""
TICKS = 12
"""Most labels of an axis."""
FAILS = ("does_not_fit", "does_not_run")


class Pen(NamedTuple):
    """How a card's lines are drawn."""

    colour: str
    width: float


def check(path: str) -> None:
    """Ask before any work is done. Raises InputError for what is no such file, MissingExtraError without matplotlib."""
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise UnknownNameError("--plot", path, SUFFIXES)
    if not file.parent.is_dir() or file.is_dir():
        raise InputError("--plot", path, "accepted: a file in an existing folder")
    if find_spec("matplotlib") is None:
        raise MissingExtraError("--plot", "plot")


class Map:
    """Collects a sweep's rows, and draws them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._panels: dict[tuple[object, ...], dict[str, dict[tuple[int, int], tuple[int, str | None]]]] = {}
        self._options: tuple[str, ...] = ()
        self._title = ""

    def expect(self, result: Sweep) -> None:
        """Raises RefusedError for a grid that no figure shows."""
        several = {name: len(result.values_of(name)) for name in result.columns if len(result.values_of(name)) > 1}
        others = {name: count for name, count in several.items() if name not in (ACROSS, DOWN)}
        panels = 1
        for count in others.values():
            panels *= count
        if not several.keys() & {ACROSS, DOWN}:
            raise RefusedError("--plot: a map needs several batch sizes or sequence lengths")
        if panels > MOST_PANELS:
            options = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in others.items())
            raise RefusedError(f"--plot: {panels:,} maps would be drawn ({options}); accepted: up to {MOST_PANELS}")
        if (cells := several.get(ACROSS, 1) * several.get(DOWN, 1)) > MOST_CELLS:
            raise RefusedError(f"--plot: a map would have {cells:,} points; accepted: up to {MOST_CELLS:,}")
        self._options = tuple(others)

    def add(self, chunk: Chunk) -> None:
        """Take the rows of a chunk that have numbers."""
        panels = zip(*(chunk[name] for name in self._options), strict=True) if self._options else ((),) * len(chunk["model"])
        rows = zip(panels, chunk["gpu"], chunk[ACROSS], chunk[DOWN], chunk["requested_bytes"], chunk["verdict"], strict=True)
        for panel, gpu, across, down, requested, verdict in rows:
            if requested is not None:
                self._panels.setdefault(panel, {}).setdefault(gpu or "", {})[across, down] = (requested, verdict)
        self._title = self._title or f"{chunk['model'][0]} · {chunk['method'][0]}"

    def write(self) -> None:
        """Write the figure; the file appears whole or not at all. Raises RefusedError where no point has numbers."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        if not self._panels:
            raise RefusedError("--plot: no point of the grid has a peak")
        columns = min(len(self._panels), 3)
        rows = ceil(len(self._panels) / columns)
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        places = figure.subplots(rows, columns, squeeze=False).ravel()
        top = max(cell[0] for by_card in self._panels.values() for cells in by_card.values() for cell in cells.values()) / GIB
        drawn: QuadMesh | None = None
        for axes, (panel, by_card) in zip(places, self._panels.items(), strict=False):
            drawn = _draw(axes, by_card, top=top)
            labels = (f"{name.replace('_', ' ')} {value}" for name, value in zip(self._options, panel, strict=True))
            axes.set_title(", ".join(labels) or self._title, loc="left", fontsize=10)
        for axes in places[len(self._panels) :]:
            axes.set_axis_off()
        assert drawn is not None
        figure.colorbar(drawn, ax=list(places), label="GiB requested by tensors at the peak", shrink=0.8)
        if self._options:
            figure.suptitle(self._title.partition(" · ")[0], x=0.01, ha="left")
        lines = {label: line for axes in places for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(list(lines.values()), list(lines), loc="outside lower left", ncols=2, fontsize=8, frameon=False)
        metadata: dict[str, None] = {} if self.path.endswith(".svg") else {"Software": None}
        with replacing(self.path, field="--plot") as file:
            figure.savefig(file, format=Path(self.path).suffix[1:], metadata=metadata)


def _draw(axes: Axes, by_card: Mapping[str, Mapping[tuple[int, int], tuple[int, str | None]]], *, top: float) -> QuadMesh:
    """One map: colours of the first card, a line for each."""
    cells = next(iter(by_card.values()))
    across, down = (sorted({at[axis] for at in cells}) for axis in (0, 1))
    grid = [[cells[x, y][0] / GIB if (x, y) in cells else float("nan") for x in across] for y in down]
    mesh = axes.pcolormesh(range(len(across) + 1), range(len(down) + 1), grid, cmap="YlGnBu", vmin=0, vmax=top)
    between = False
    for number, (card, of_card) in enumerate(by_card.items()):
        verdicts = [[of_card[x, y][1] if (x, y) in of_card else None for x in across] for y in down]
        between = between or any(word not in ("fits", *FAILS) for row in verdicts for word in row)
        pen = Pen(COLOURS[number % len(COLOURS)], THINNEST + THICKER * (len(by_card) - 1 - number))
        if card:
            _edge(axes, [[word == "fits" for word in row] for row in verdicts], pen, "-", f"{card}: fits below and left")
            _edge(axes, [[word in FAILS for word in row] for row in verdicts], pen._replace(width=THINNEST), ":", None)
    _ticks(axes, across, down)
    if any(by_card):
        axes.plot([], [], ":", color="grey", label="dotted: does not fit above and right")
    if between and any(by_card):
        axes.plot([], [], " ", label="between solid and dotted: tight, or no verdict")
    return mesh


def _edge(axes: Axes, inside: Sequence[Sequence[bool]], pen: Pen, style: str, label: str | None) -> None:
    """The outline between cells that are inside and cells that are not."""
    height, width = len(inside), len(inside[0])
    xs: list[float | None] = []
    ys: list[float | None] = []
    for y, x in product(range(height), range(width)):
        if x + 1 < width and inside[y][x] != inside[y][x + 1]:
            xs += [x + 1, x + 1, None]
            ys += [y, y + 1, None]
        if y + 1 < height and inside[y][x] != inside[y + 1][x]:
            xs += [x, x + 1, None]
            ys += [y + 1, y + 1, None]
    gaps = [float("nan") if x is None else x for x in xs], [float("nan") if y is None else y for y in ys]
    axes.plot(*gaps, color=pen.colour, linestyle=style, linewidth=pen.width, label=label)


def _ticks(axes: Axes, across: Sequence[int], down: Sequence[int]) -> None:
    for values, place, label in ((across, axes.set_xticks, axes.set_xlabel), (down, axes.set_yticks, axes.set_ylabel)):
        step = ceil(len(values) / TICKS)
        place([at + 0.5 for at in range(0, len(values), step)], [f"{value:,}" for value in values[::step]], fontsize=8)
        label("tokens per sequence" if values is across else "batch size")
    axes.tick_params(axis="x", rotation=45)
