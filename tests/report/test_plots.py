"""Figures of `compare` and `sweep`: what is drawn, read back from matplotlib's axes, is what the rows of the command say."""

from __future__ import annotations

import csv
import json
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cli.run import run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

figures = pytest.importorskip("matplotlib.figure")
np = pytest.importorskip("numpy")
GIB = 1024**3
Edge = tuple[float, float, float, float]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return saved


def test_bars_and_lines_of_a_comparison_are_its_rows(drawn: list[Figure], tmp_path: Path) -> None:
    job = ("compare", "llama-3.2-1b", "--method", "lora,qlora,full", "--gpu", "t4,l4,h200", "--batch-size", "6")
    rows = json.loads(run(*job, "--plot", str(tmp_path / "compare.png"), "--format", "json").out)["rows"]
    (axes,) = drawn[0].axes
    peaks = dict(label.get_text().split("\n") for label in axes.get_yticklabels())
    methods = list(peaks)
    assert methods == ["full", "qlora", "lora"]  # from the bottom: as typed from the top
    ends = dict.fromkeys(methods, 0.0)
    widths: dict[str, dict[str, int]] = {name: {} for name in methods}
    for bars in axes.containers:
        for method, bar in zip(methods, bars.patches, strict=True):
            assert bar.get_y() + bar.get_height() / 2 == methods.index(method)
            assert bar.get_x() == pytest.approx(ends[method], abs=1e-9)  # begins where the last one ends
            ends[method] += bar.get_width()
            widths[method][bars.get_label().replace(" ", "_")] = round(bar.get_width() * GIB)
    for row in rows:
        assert {name: size for name, size in widths[row["method"]].items() if size} == {
            name: size for name, size in row["by_category"].items() if size
        }
        assert round(ends[row["method"]] * GIB) == row["peak_allocated"]
    words = {text.get_text(): getattr(text, "xy", text.get_position()) for text in axes.texts}
    assert peaks == {row["method"]: f"{row['peak_allocated'] / GIB:.2f} GiB" for row in rows}
    # a card far beyond the longest bar has no line: the H200 has 140 GiB
    (h200,) = {row["usable_bytes"] for row in rows if row["gpu"] == "h200"}
    lines = {round(float(line.get_xdata()[0]) * GIB) for line in axes.lines}
    assert lines == {row["usable_bytes"] for row in rows if row["gpu"] in ("t4", "l4")}
    for gpu in ("t4", "l4"):
        assert round(words[gpu][0] * GIB) in {row["usable_bytes"] for row in rows if row["gpu"] == gpu}
    assert axes.get_xlabel().endswith(f"to the right of it: h200 {h200 / GIB:.2f} GiB")
    assert axes.get_xlim()[1] > max(*ends.values(), *(line / GIB for line in lines))


def test_no_line_of_a_card_crosses_a_number(drawn: list[Figure], tmp_path: Path) -> None:
    """The peak of LoRA (18.68 GiB) stood over the lines of two cards of 22 GiB."""
    run("compare", "llama-3.1-8b", "--method", "lora,full", "--gpu", "l4,a10g", "--plot", str(tmp_path / "compare.png"))
    (axes,) = drawn[0].axes
    lines = [line.get_window_extent() for line in axes.lines]
    numbers = [text for text in (*axes.texts, *axes.get_yticklabels()) if "GiB" in text.get_text()]
    assert (len(lines), len(numbers)) == (2, 2)
    assert not [text for text in numbers for line in lines if text.get_window_extent().overlaps(line)]


def test_cells_and_lines_of_a_map_are_the_rows_of_the_sweep(drawn: list[Figure], tmp_path: Path) -> None:
    grid = ("--batch-size", "1,4,16,32", "--seq-len", "256:1024:256", "--method", "lora,full", "--gpu", "t4,l4")
    rows = list(csv.DictReader(run("sweep", "gpt2", *grid, "--plot", str(tmp_path / "sweep.png")).out.splitlines()))
    verdicts = {row["verdict"] for row in rows}
    assert verdicts >= {"fits", "does_not_fit"}
    *maps, scale = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in maps] == ["method lora", "method full"]
    top = max(int(row["requested_bytes"]) for row in rows) / GIB
    assert scale.get_ylim() == (0, pytest.approx(top))
    for axes in maps:
        method = axes.get_title(loc="left").removeprefix("method ")
        cells = {(row["gpu"], row["seq_len"], row["batch_size"]): row for row in rows if row["method"] == method}
        across, down = (
            [label.get_text().replace(",", "") for label in labels] for labels in (axes.get_xticklabels(), axes.get_yticklabels())
        )
        (mesh,) = axes.collections
        assert [[round(value * GIB) for value in row] for row in mesh.get_array().tolist()] == [
            [int(cells["t4", x, y]["requested_bytes"]) for x in across] for y in down
        ]
        assert mesh.get_clim() == (0, pytest.approx(top))
        outlines = [line for line in axes.lines if len(line.get_xdata()) > 0 or line.get_label().startswith("_")]
        fits, fails = outlines[::2], outlines[1::2]
        for gpu, within, beyond in zip(("t4", "l4"), fits, fails, strict=True):
            assert (within.get_label(), within.get_linestyle(), beyond.get_linestyle()) == (
                f"{gpu}: fits below and left",
                "-",
                ":",
            )
            assert within.get_color() == beyond.get_color()
            assert within.get_linewidth() > fits[-1].get_linewidth() or within is fits[-1]  # one line on another is seen
            verdicts = [[cells[gpu, x, y]["verdict"] for x in across] for y in down]
            assert edges(within) == outline(verdicts, {"fits"})
            assert edges(beyond) == outline(verdicts, {"does_not_fit", "does_not_run"})


def edges(line: Line2D) -> set[Edge]:
    """Middle and length of each stroke of a line; a gap follows each."""
    points = list(zip(*(np.asarray(line.get_data()).tolist()), strict=True))
    strokes = zip(points[::3], points[1::3], strict=True)
    return {((x + right) / 2, (y + upper) / 2, right - x, upper - y) for (x, y), (right, upper) in strokes}


def outline(verdicts: list[list[str]], inside: set[str]) -> set[Edge]:
    """A stroke half-way between the middles of two neighbours of which one alone is inside, across the way between them."""
    cells = {(x + 0.5, y + 0.5): word in inside for y, row in enumerate(verdicts) for x, word in enumerate(row)}
    ways = ((1, 0), (0, 1))
    return {
        (x + right / 2, y + upper / 2, upper, right)
        for ((x, y), within), (right, upper) in product(cells.items(), ways)
        if cells.get((x + right, y + upper), within) != within
    }
