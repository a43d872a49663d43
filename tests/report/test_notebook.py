"""Results in a notebook: the answer that the command prints, every text escaped, no script."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

import peftplan
from peftplan.report.markup import Stretch, bar, table, text
from peftplan.report.tabular import Column

TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 128, "_name_or_path": "<script>alert('x')</script>",
}  # fmt: skip

RESULTS: dict[str, Callable[[], Any]] = {
    "estimate": lambda: peftplan.estimate(TINY, r=4, gpu=("l4", "16MiB")),
    "comparison": lambda: peftplan.compare(TINY, methods=("lora", "full"), gpu="l4"),
    "fit": lambda: peftplan.fit(TINY, gpu="l4", max="r", methods="lora"),
    "serving": lambda: peftplan.serving(TINY, r=4),
    "inspection": lambda: peftplan.inspect(TINY, pattern="q_proj"),
}
VOID = ("br", "hr", "img")


class Balanced(HTMLParser):
    """Fails on a tag that closes another than the last one that was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in (*VOID, "script")
        assert not any(name.startswith("on") for name, _ in attrs)
        self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag


@pytest.mark.parametrize("name", RESULTS)
def test_a_view_is_well_formed_and_runs_nothing(name: str) -> None:
    shown = RESULTS[name]()._repr_html_()
    reader = Balanced()
    reader.feed(shown)
    assert reader.opened == []
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in shown


def test_an_estimate_says_what_the_command_says() -> None:
    result = RESULTS["estimate"]()
    shown = re.sub(r"<style>.*?</style>|<[^>]*>", "", result._repr_html_())
    assert f"{result.trainable_parameters:,}" in shown
    assert "✓ L4:" in shown
    assert "✗ 16MiB: does not fit, needs" in shown


def test_widths_of_a_bar_are_shares_of_it() -> None:
    assert re.findall(r"width:([0-9.]+)%", bar([Stretch("red", 1, "a"), Stretch("blue", 2, "b")], scale=4)) == [
        "25.000",
        "50.000",
    ]


def test_cells_are_escaped_once() -> None:
    assert text(text("<&>")) == "&lt;&amp;&gt;"
    assert '<td class="n k">1 &lt; 2</td>' in table([Column("n", right=True)], [["1 < 2"]])


@pytest.mark.parametrize("name", RESULTS)
def test_a_wide_table_scrolls_alone(name: str) -> None:
    """Text above a table stays in its place on a phone."""
    shown = RESULTS[name]()._repr_html_()
    assert shown.count("<table>") == shown.count('<div class="scroll"><table>') > 0
    assert "overflow-x" not in re.findall(r"\.peftplan\{(.*?)\}", shown)[0]


def test_an_option_is_not_broken_at_its_hyphens() -> None:
    assert text("add --loss trl-chunked; a--b") == 'add <span class="o">--loss trl-chunked</span>; a--b'


def test_a_long_cell_makes_no_high_row() -> None:
    """A source of 200 letters in a column of eleven would be 18 lines."""
    assert '<td class="l">' in table([Column("source")], [["word " * 40]])
    assert '<td class="k">' in table([Column("source")], [["word"]])


@pytest.mark.parametrize("make", [peftplan.models, peftplan.gpus, peftplan.methods, peftplan.practices])
def test_a_listing_is_a_table(make: Callable[[], Any]) -> None:
    """A row for each record; a list of hundreds of records as Python prints it does not answer."""
    entries = make()
    shown = entries._repr_html_()
    reader = Balanced()
    reader.feed(shown)
    assert shown.count("<tr>") == 1 + len(entries)
    assert len(re.findall("<th[ >]", shown)) == len(entries.records()[0])
    assert peftplan.models("no such model")._repr_html_().count("<tr>") == 1


@pytest.mark.parametrize(("name", "header"), [("comparison", "card"), ("fit", "plan")])
def test_a_verdict_comes_before_the_numbers_of_its_row(name: str, header: str) -> None:
    """A phone is 390 pixels wide and shows four columns."""
    shown = RESULTS[name]()._repr_html_()
    headers = re.findall(r"<th[ >].*?</th>", shown)
    behind = next(at for at, cell in enumerate(headers) if f">{header}<" in cell) + 1
    assert ">verdict<" in headers[behind]
    rows = [re.findall(r"<td.*?</td>", row) for row in re.findall(r"<tr>(<td.*?)</tr>", shown)]
    assert all("fits" in row[behind] and len(row) == len(headers) for row in rows)


@pytest.mark.parametrize("name", ["comparison", "fit", "serving", "inspection"])
def test_records_are_flat(name: str) -> None:
    for record in RESULTS[name]().records():
        assert all(isinstance(value, (str, int, float, bool, type(None))) for value in record.values()), record


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_becomes_a_table(name: str) -> None:
    pytest.importorskip("pandas")
    assert len(RESULTS[name]().to_dataframe()) > 0


def test_lines_of_a_table_sum_to_the_peak() -> None:
    pytest.importorskip("pandas")
    result = RESULTS["estimate"]()
    assert result.to_dataframe()["bytes"].sum() == result.peaks.allocated
