"""`--explain-peak`: rows that add up to the peak in every format, legible at every width; incomplete results say so."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from peftplan.errors import RefusedError
from peftplan.report import peak, render
from tests.cli.run import run
from tests.report.tiny_estimate import LINES, MANY, MANY_PEAK, PEAK, tiny_estimate

UNKNOWN = ("model.layers.*.gate asked for a value that a fake tensor does not have",)


def shown(capsys: pytest.CaptureFixture[str], result: Any, *, fmt: str = "table", verbose: bool = False) -> str:
    """What `render.estimate` writes."""
    render.estimate(result, fmt=fmt, verbose=verbose, explain_peak=True)
    return capsys.readouterr().out


def test_rows_are_sorted_and_add_up() -> None:
    rows = peak.rows(tiny_estimate())
    assert [row.bytes for row in rows] == [393_216, 262_144, 262_144, 1_024]
    assert sum(row.bytes for row in rows) == PEAK == tiny_estimate().to_dict()["memory"]["peak_allocated"]
    assert [round(row.share, 4) for row in rows] == [0.4281, 0.2854, 0.2854, 0.0011]  # 393,216 / 918,528 …
    assert (rows[0].copies, rows[0].shape, rows[0].dtype, rows[0].made_by) == (3, (2, 64, 256), "fp32", "aten.mul.Tensor")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("base_model.model.model.layers.*.mlp.up_proj.base_layer.weight", "model.layers.*.mlp.up_proj.weight"),
        ("base_model.model.model.layers.*.q_proj.lora_A.default.weight", "model.layers.*.q_proj.lora_A.weight"),
        ("base_model.model", "(model)"),
        ("model.default_head.weight", "model.default_head.weight"),
    ],
)
def test_names_are_those_of_the_model(name: str, kind: str) -> None:
    assert peak.kind(name) == kind


def table_of(text: str) -> dict[str, tuple[int, int]]:
    """The section's rows: name → (copies, bytes), whatever the width."""
    section = text.partition("largest at the peak")[2].partition("Assumptions")[0]
    row = re.compile(r"^(\S.*?)\s+([\d,]+)\s+([\d,]+)\s+[\d.]+%$", re.M)
    return {m[1]: (int(m[2].replace(",", "")), int(m[3].replace(",", ""))) for m in row.finditer(section)}


@pytest.mark.parametrize("columns", ["80", "120", "200"])
def test_a_table_adds_up_at_every_width(columns: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = shown(capsys, tiny_estimate(MANY))
    assert max(map(len, text.splitlines())) <= int(columns)
    rows = table_of(text)
    assert rows.pop("sum, the peak") == (60, MANY_PEAK)
    assert len(rows) == peak.MOST + 1
    # the ten smallest: 2 × 512 × (1 + … + 10)
    assert rows["… and 10 more lines"] == (20, 2 * 512 * 55)
    assert sum(num_bytes for _, num_bytes in rows.values()) == MANY_PEAK


def test_verbose_shows_every_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "more lines" not in shown(capsys, tiny_estimate(MANY), verbose=True)
    assert "more lines" not in shown(capsys, tiny_estimate(MANY[: peak.MOST + 1])), "a rest of one is no rest"


def test_what_a_row_is_stands_under_it(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(capsys, tiny_estimate()).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("largest at the peak, in backward"))
    assert lines[start + 2].split() == ["model.layers.*.mlp", "3", "393,216", "42.8%"]
    assert lines[start + 3] == "  activations · fp32 2×64×256 · mul"
    assert "  weights · bf16 256×128" in lines, "what was loaded names no operation"


def test_programs_get_every_group(capsys: Any) -> None:
    document = json.loads(shown(capsys, tiny_estimate(MANY), fmt="json"))
    assert sum(group["bytes"] for group in document["largest"]) == document["memory"]["peak_allocated"] == MANY_PEAK
    assert document["largest"][0]["shape"] == [256, 30]
    rows = list(csv.DictReader(io.StringIO(shown(capsys, tiny_estimate(MANY), fmt="csv"))))
    assert sum(int(row["bytes"]) for row in rows) == MANY_PEAK
    assert list(rows[0]) == ["category", "name", "made_by", "dtype", "shape", "copies", "bytes", "share"]


def test_markdown_adds_up(capsys: Any) -> None:
    text = shown(capsys, tiny_estimate(MANY), fmt="markdown")
    section = text.partition("| largest at the peak, in backward |")[2].partition("\n\n")[0].splitlines()[2:]
    sizes = [int(row.split("|")[6].replace(",", "")) for row in section]
    assert sum(sizes[:-1]) == sizes[-1] == MANY_PEAK
    assert "… and 10 more lines" in text


def test_what_lies_elsewhere_is_not_listed() -> None:
    assert [line.name for line in LINES if line.place != "device"] == ["paged"]
    assert "paged" not in [row.name for row in peak.rows(tiny_estimate())]


def test_without_a_peak_it_is_refused(capsys: Any) -> None:
    with pytest.raises(RefusedError, match="explain_peak: the analytic engine states no peak"):
        shown(capsys, replace(tiny_estimate(), engine="analytic", peaks=None))
    assert capsys.readouterr().out == ""


def test_an_incomplete_result_says_so_in_every_format(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = tiny_estimate(incomplete=UNKNOWN)
    assert f"the peak is a lower bound: {UNKNOWN[0]}" in shown(capsys, result).replace("\n ", "")
    table = shown(capsys, result, verbose=True)
    assert f"incomplete: the peak is a lower bound: {UNKNOWN[0]}" in table.replace("\n", " ")
    assert "sum, a lower bound of the peak" in table
    assert f"**Incomplete:** the peak is a lower bound: {UNKNOWN[0]}" in shown(capsys, result, fmt="markdown")
    assert json.loads(shown(capsys, result, fmt="json"))["memory"]["incomplete"] == list(UNKNOWN)
    for explain in (True, False):
        render.estimate(result, fmt="csv", verbose=False, explain_peak=explain)
        *rows, last = csv.DictReader(io.StringIO(capsys.readouterr().out))
        assert (last["category"], last["name"], last["bytes"]) == ("incomplete", UNKNOWN[0], "")
        assert "incomplete" not in {row["category"] for row in rows}
    complete = shown(capsys, tiny_estimate(), verbose=True)
    assert "incomplete" not in complete
    assert "sum, the peak " in complete


def test_a_complete_result_lists_nothing() -> None:
    assert json.loads(run("estimate", "gpt2", "--format", "json").out)["memory"]["incomplete"] == []
