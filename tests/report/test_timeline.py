"""Timelines of a series made by hand: what a page holds, what a picture shows, and that a file appears whole or not at all."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import pytest

from peftplan.errors import InputError, MissingExtraError, RefusedError, UnknownNameError
from peftplan.ledger import EVERY_CATEGORY
from peftplan.report import timeline, timeline_html, timeline_png, timeline_svg
from peftplan.report.colours import COLOURS
from peftplan.results.estimate import Estimate
from peftplan.results.peaks import Peaks
from peftplan.results.series import Group, Series, Span, extremes
from peftplan.units import MIB
from tests.report.tiny_estimate import LINES, tiny_estimate

SERIES = Series(
    times=(0, 3, 5, 8, 10),
    by_category={
        "weights": [4 * MIB] * 5,
        "activations": [0, 2 * MIB, 6 * MIB, MIB, 0],
        "gradients": [0, 0, 0, 3 * MIB, 0],
    },
    phases=(Span("forward", 0, 5), Span("backward", 5, 9), Span("step", 9, 10)),
    reserved=[12 * MIB] * 5,
    largest=[[Group("</script><b>layers.*", 2, MIB)]] * 5,
)


class Recorded:
    """A recording of the series above."""

    def series(self) -> Series:
        return SERIES

    def save(self, path: str, *, title: str) -> None:
        Path(path).write_text(title)


def recorded() -> Estimate:
    result = tiny_estimate()
    assert result.peaks is not None
    return replace(result, peaks=Peaks(result.peaks.ledgers, recording=Recorded(), incomplete=("<gate> asked",)))


def test_a_series_adds_up_and_knows_its_phases() -> None:
    assert [n // MIB for n in SERIES.total] == [4, 6, 10, 8, 4]
    assert [SERIES.phase_at(time) for time in (0, 4, 5, 8, 9, 10)] == [
        "forward",
        "forward",
        "backward",
        "backward",
        "step",
        "step",
    ]


@pytest.mark.parametrize("most", [4, 10, 50])
def test_thinning_keeps_peaks_valleys_and_ends(most: int) -> None:
    levels = [(n * 7919) % 101 for n in range(1000)]
    kept = extremes(levels, most=most)
    assert (kept[0], kept[-1]) == (0, 999)
    assert len(kept) <= most + 2
    assert {max(levels), min(levels)} <= {levels[at] for at in kept}
    assert extremes(levels, most=1000) == list(range(1000))


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of the data script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "line"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"] and data.startswith("{"):
            self.data = data


def test_a_page_holds_all_of_it_and_asks_for_nothing(tmp_path: Path) -> None:
    timeline.write(recorded(), str(tmp_path / "t.html"))
    text = (tmp_path / "t.html").read_text(encoding="utf-8")
    page = Tags(text)
    assert page.open == []
    assert not re.search(r"(src|href)=|url\(|\bimport\b|fetch\(|XMLHttpRequest|https?:", text)
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'")
    data = json.loads(page.data)
    assert data["times"] == [0, 3, 5, 8, 10]
    assert data["categories"]["activations"] == [0, 2 * MIB, 6 * MIB, MIB, 0]
    assert data["names"] == ["</script><b>layers.*"], "a name is data, whatever it contains"
    assert data["peak"] == 2
    assert "Peak 10.00 MiB (10,485,760 bytes), in backward." in text
    assert "incomplete: &lt;gate&gt; asked" in text
    assert text.count("<path fill=") == 3


def test_areas_are_where_the_numbers_are() -> None:
    frame = timeline_svg.frame_of(SERIES)
    # 12 MiB reserved is the top; the plot is 420 − 28 − 24 = 368 high, so 4 MiB of weights end at 420 − 24 − 368 / 3 = 273.3
    assert (frame.y(12 * MIB), frame.y(0), frame.y(4 * MIB)) == (28, 396, 273.3)
    # and 924 wide from 64: time 5 of 10 is its middle
    assert (frame.x(0), frame.x(5), frame.x(10)) == (64, 526, 988)
    weights, activations, _ = re.findall(r'<path fill="\S+" d="([^"]+)"', timeline_svg.drawing(SERIES))
    assert weights == "M64 273.3 H988 V396 H64Z"
    # 4 MiB until time 3 (64 + 0.3 × 924 = 341.2), then 6 MiB (212), 10 MiB (89.3), 5 MiB (242.7), 4 MiB at the end
    assert activations == "M64 273.3 H341.2V212 H526V89.3 H803.2V242.7 H988V273.3 H988 V273.3 H64Z"


@pytest.mark.parametrize(
    ("highest", "step"), [(0.3, 0.5), (0.04, 0.05), (1.0, 1), (1.3, 2), (3.0, 5), (5.5, 10), (9.7, 10), (12, 20), (60, 100)]
)
def test_grid_lines_are_round(highest: float, step: float) -> None:
    assert timeline_svg._nice(highest) == pytest.approx(step)


def test_a_picture_shows_every_category(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    timeline.write(recorded(), str(tmp_path / "t.png"))
    pixels = {tuple(round(float(v) * 255) for v in rgb) for row in image.imread(tmp_path / "t.png") for rgb in row[:, :3]}
    for category in SERIES.by_category:
        colour = COLOURS[category]
        assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in pixels, category
    other = tuple(int(COLOURS["logits"][i : i + 2], 16) for i in (1, 3, 5))
    assert other not in pixels
    assert [path.name for path in tmp_path.iterdir()] == ["t.png"]


def test_every_category_has_a_colour_of_its_own() -> None:
    assert {line.category for line in LINES} <= set(COLOURS)
    assert len(set(COLOURS.values())) == len(COLOURS) == len(EVERY_CATEGORY)


def test_a_log_is_the_recordings_own(tmp_path: Path) -> None:
    timeline.write(recorded(), str(tmp_path / "t.json"))
    # the job as tests/report/made.py states it: rank 8, batch 1, 2048 tokens are the defaults
    assert (tmp_path / "t.json").read_text().endswith("tiny.json · lora r=8 · batch 1 × 2048 tokens · trace")


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"timeline: '.*t\.pnh' .*\.png"):
        timeline.check(str(tmp_path / "t.pnh"))
    with pytest.raises(InputError, match="in an existing folder"):
        timeline.check(str(tmp_path / "no" / "t.html"))
    (tmp_path / "d.html").mkdir()
    with pytest.raises(InputError, match="accepted: a file"):
        timeline.check(str(tmp_path / "d.html"))
    with patch.object(timeline, "find_spec", return_value=None), pytest.raises(MissingExtraError, match=r"peftplan\[plot\]"):
        timeline.check(str(tmp_path / "t.png"))
    timeline.check(str(tmp_path / "t.json"))


def test_an_engine_without_a_recording_is_refused() -> None:
    with pytest.raises(RefusedError, match="timeline: the trace engine keeps no event log"):
        timeline.write(tiny_estimate(), "t.html")


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", ["t.html", "t.png"])
def test_a_drawing_that_stops_leaves_no_file(tmp_path: Path, name: str, stopped: type[BaseException]) -> None:
    module, function = (timeline_html, "page") if name == "t.html" else (timeline_png, "picture")
    with patch.object(module, function, side_effect=stopped), pytest.raises(stopped):
        timeline.write(recorded(), str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_a_job_of_pictures_has_no_tokens_in_its_title() -> None:
    result = tiny_estimate()
    words = timeline.title(result).split(" · ")
    pictures = {name: value for name, value in result.assumptions.items() if name != "seq_len"}
    expected = [*words[:2], words[2].partition(" ×")[0], *words[3:]]
    assert timeline.title(replace(result, assumptions=pictures)).split(" · ") == expected
