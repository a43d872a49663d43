"""The plots of the accuracy page, as SVG: the same bytes from the same data with the same matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from peftplan.accuracy.drift import GROUPINGS, MARKS, Answer
from peftplan.errors import MissingExtraError
from peftplan.units import GIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (8.0, 4.5)
"""Inches."""
EDGE = 10.0
"""Percent: drift beyond it is counted in the outermost bars."""
BAR = 0.5
"""Percent: the width of a bar."""
TICKS = [2**power for power in range(11)]
"""GiB."""
STYLE = {"svg.hashsalt": "peftplan", "svg.fonttype": "none", "font.size": 9}
METADATA = {"Date": None, "Creator": None}


def histogram(series: Mapping[str, Sequence[float]], path: Path) -> None:
    """How many overall peaks drift by how much, one colour per engine."""
    plt = _pyplot()
    bars = [number * BAR - EDGE for number in range(int(2 * EDGE / BAR) + 1)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE)
        inside = [[min(max(drift, -EDGE + BAR / 2), EDGE - BAR / 2) for drift in drifts] for drifts in series.values()]
        axes.hist(inside, bins=bars, label=list(series), stacked=False)
        axes.set_xlabel(f"drift, % of what was measured; the outermost bars hold everything beyond ± {EDGE:g} %")
        axes.set_ylabel("overall peaks")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.legend()
        _save(figure, path)


def scatter(answers: Sequence[Answer], path: Path, *, word: str) -> None:
    """Stated against measured overall peaks on log axes, one colour per source."""
    plt = _pyplot()
    from matplotlib import ticker

    points: dict[str, list[tuple[float, float]]] = {}
    for answer in answers:
        for one in answer.overall:
            pair = (one.measured / GIB, one.stated / GIB)
            points.setdefault(GROUPINGS["source"](answer.record), []).append(pair)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE)
        for number, source in enumerate(sorted(points, key=str.lower)):
            hollow = {"facecolors": "none"} if source.endswith(MARKS["leaves something open"]) else {}
            axes.scatter(
                *zip(*points[source], strict=True), s=14, label=source, edgecolors=f"C{number}", color=f"C{number}", **hollow
            )
        ends = [min(min(pair) for pairs in points.values() for pair in pairs), max(max(p) for ps in points.values() for p in ps)]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.FixedLocator(TICKS))
            axis.set_major_formatter(ticker.ScalarFormatter())
            axis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel("measured, GiB")
        axes.set_ylabel(f"{word}, GiB")
        axes.legend(fontsize=7)
        _save(figure, path)


def _pyplot() -> ModuleType:
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("--report (matplotlib)", "plot") from None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata=METADATA)
    _pyplot().close(figure)
    text = path.read_text(encoding="utf-8")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
