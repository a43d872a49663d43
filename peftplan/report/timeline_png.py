"""A timeline as a png, drawn by matplotlib (extra `plot`)."""

from __future__ import annotations

import io
from collections.abc import Sequence

from peftplan.report.colours import COLOURS
from peftplan.results.series import Series
from peftplan.units import GIB, format_bytes

INCHES = (12.0, 6.0)
DOTS_PER_INCH = 130
LETTERS = 190
"""Letters of phase names that fit side by side over the plot."""


def picture(series: Series, *, title: str, notes: Sequence[str] = ()) -> bytes:
    """Categories stacked from the ground up, phases divided by lines, the peak marked, reserved bytes as a dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    total = series.total
    axes.stackplot(
        series.times,
        *([num_bytes / GIB for num_bytes in levels] for levels in series.by_category.values()),
        labels=list(series.by_category),
        colors=[COLOURS[category] for category in series.by_category],
        step="post",
        linewidth=0,
    )
    if series.reserved is not None:
        reserved = [num_bytes / GIB for num_bytes in series.reserved]
        axes.step(series.times, reserved, where="post", color="black", linestyle="--", linewidth=1, label="reserved")
    _mark_phases(axes, series)
    _mark_peak(axes, series, total)
    axes.set_xlim(series.times[0], series.times[-1])
    axes.set_ylim(0, 1.12 * max(*total, *(series.reserved or ())) / GIB)
    axes.set_ylabel("GiB")
    axes.set_xlabel("\n".join(("allocations and frees, in order", *notes)))
    axes.set_title(title, loc="left", pad=22)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    return drawn.getvalue()


def _mark_phases(axes, series: Series) -> None:  # type: ignore[no-untyped-def]
    for number, span in enumerate(series.phases):
        if number:
            axes.axvline(span.start, color="black", linewidth=0.8)
        if span.end - span.start < (series.times[-1] - series.times[0]) * len(span.phase) / LETTERS:
            continue  # its name would cover the next one's
        axes.text((span.start + span.end) / 2, 1.01, span.phase, transform=axes.get_xaxis_transform(), ha="center", va="bottom")


def _mark_peak(axes, series: Series, total: list[int]) -> None:  # type: ignore[no-untyped-def]
    at = max(range(len(total)), key=total.__getitem__)
    time = series.times[at]
    left = time > (series.times[0] + series.times[-1]) / 2
    axes.plot([time], [total[at] / GIB], marker="v", color="black", markersize=6, clip_on=False)
    axes.annotate(
        f"peak {format_bytes(total[at])}, {series.phase_at(time)}",
        (time, total[at] / GIB),
        xytext=(-8 if left else 8, 8),
        textcoords="offset points",
        ha="right" if left else "left",
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )
