"""The drawing of a timeline page: stacked areas as SVG paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from peftplan.report.colours import COLOURS
from peftplan.results.series import Series
from peftplan.units import GIB, MIB

WIDTH, HEIGHT = 1000, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 28, 24
"""Margins of the plot inside the drawing, in its own units."""
LETTER = 5
"""About the width of a letter of a phase's name; a narrower phase has no name."""
TICKS = 6
"""About so many lines across."""


class Frame(NamedTuple):
    """From times and bytes to the drawing's units."""

    first: int
    last: int
    highest: int

    def x(self, time: float) -> float:
        """Where a time lies."""
        return round(LEFT + (time - self.first) / max(self.last - self.first, 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, num_bytes: int) -> float:
        """Where a level lies."""
        return round(HEIGHT - BOTTOM - num_bytes / self.highest * (HEIGHT - TOP - BOTTOM), 1)


def frame_of(series: Series) -> Frame:
    """The frame that holds all of a series."""
    return Frame(series.times[0], series.times[-1], max(1, *series.total, *(series.reserved or ())))


def drawing(series: Series) -> str:
    """One `<svg>`: a path per category, the reserved bytes, phases, and an empty cursor."""
    frame = frame_of(series)
    parts = [*_grid(frame), *_areas(series, frame)]
    if series.reserved is not None:
        line = _steps([frame.x(t) for t in series.times], [frame.y(n) for n in series.reserved])
        parts.append(f'<path class="reserved" d="M{line}"/>')
    parts += _phases(series, frame)
    parts.append(f'<line id="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/>')
    body = "\n".join(parts)
    label = "memory over time, stacked by category"
    return f'<svg id="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" tabindex="0">\n{body}\n</svg>'


def _areas(series: Series, frame: Frame) -> Iterator[str]:
    xs = [frame.x(time) for time in series.times]
    below = [0] * len(xs)
    for category, levels in series.by_category.items():
        above = [base + level for base, level in zip(below, levels, strict=True)]
        top = _steps(xs, [frame.y(n) for n in above])
        ground = _steps_back(xs, [frame.y(n) for n in below])
        yield f'<path fill="{COLOURS[category]}" d="M{top} {ground}Z"><title>{category}</title></path>'
        below = above


def _steps(xs: Sequence[float], ys: Sequence[float]) -> str:
    """`x y H x V y …`: each level holds until the next one begins; equal neighbours are one."""
    text = [f"{xs[0]:g} {ys[0]:g}"]
    for number in range(1, len(xs)):
        if ys[number] != ys[number - 1]:
            text.append(f"H{xs[number]:g}V{ys[number]:g}")
    return " ".join([*text, f"H{xs[-1]:g}"])


def _steps_back(xs: Sequence[float], ys: Sequence[float]) -> str:
    """The same line from its end to its start."""
    text = [f"V{ys[-1]:g}"]
    for number in range(len(xs) - 1, 0, -1):
        if ys[number] != ys[number - 1]:
            text.append(f"H{xs[number]:g}V{ys[number - 1]:g}")
    return " ".join([*text, f"H{xs[0]:g}"])


def _grid(frame: Frame) -> Iterator[str]:
    unit, name = (GIB, "GiB") if frame.highest >= GIB else (MIB, "MiB")
    step = _nice(frame.highest / unit / TICKS)
    for number in range(int(frame.highest / unit / step) + 1):
        y = frame.y(int(number * step * unit))
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:g}" y2="{y:g}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:g}" text-anchor="end">{number * step:g} {name}</text>'


def _nice(step: float) -> float:
    """The next of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** (len(f"{step:.0f}") - 1) if step >= 1 else 10.0 ** -next(n for n in range(1, 12) if step * 10**n >= 1)
    return power * next((factor for factor in (1, 2, 5) if factor * power >= step), 10)


def _phases(series: Series, frame: Frame) -> Iterator[str]:
    for number, span in enumerate(series.phases):
        start, end = frame.x(span.start), frame.x(span.end)
        if number:
            yield f'<line class="phase" x1="{start:g}" x2="{start:g}" y1="{TOP - 14}" y2="{HEIGHT - BOTTOM}"/>'
        if end - start >= LETTER * len(span.phase):
            yield f'<text x="{(start + end) / 2:g}" y="{TOP - 10}" text-anchor="middle">{escape(span.phase)}</text>'
