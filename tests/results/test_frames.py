"""Rows of every result as polars and pandas take them: columns, types and values survive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import peftplan

RESULTS: dict[str, Callable[[], Any]] = {
    "estimate": lambda: peftplan.estimate("gpt2", gpu="t4"),
    "compare": lambda: peftplan.compare("gpt2", methods="lora,ia3,full,qlora", gpu=["t4", "l4"]),
    "compare with a refusal": lambda: peftplan.compare("gpt2", methods="lora,full", quant="nf4"),
    "fit": lambda: peftplan.fit("gpt2", gpu="t4", methods=("full", "qlora")),
    "fit that fails": lambda: peftplan.fit("llama-2-70b", gpu="t4", method="lora", methods=("qlora",)),
    "serving": lambda: peftplan.serving("gpt2", gpu="t4"),
    "inspection": lambda: peftplan.inspect("gpt2"),
    "models": lambda: peftplan.models("qwen3"),
    "gpus": lambda: peftplan.gpus("l4"),
    "methods": lambda: peftplan.methods(),
    "practices": lambda: peftplan.practices("rank"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_records_are_a_frame(name: str) -> None:
    polars = pytest.importorskip("polars")
    rows = RESULTS[name]().records()
    frame = polars.DataFrame(rows)
    assert frame.height == len(rows) > 0
    assert list(dict.fromkeys(column for row in rows for column in row)) == frame.columns
    for row, taken in zip(rows, frame.to_dicts(), strict=True):
        assert {column: value for column, value in taken.items() if value is not None} == {
            column: list(value) if isinstance(value, tuple) else value for column, value in row.items() if value is not None
        }


def test_a_sweep_is_taken_as_it_is() -> None:
    """Its rows, and its columns chunk by chunk."""
    polars = pytest.importorskip("polars")
    rows = peftplan.sweep("gpt2", batch_size=[1, 2], r=[4, 8], gpu=["t4", "l4"])
    frame = polars.DataFrame(rows)
    assert frame.height == rows.num_rows == 8
    assert frame["needed_bytes"].dtype == polars.Int64
    assert frame["batch_size"].to_list() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert polars.concat(polars.DataFrame(chunk) for chunk in rows.chunks()).equals(frame)


@pytest.mark.parametrize("library", ["polars", "pandas", "pyarrow"])
def test_a_column_that_begins_without_values_is_taken_too(library: str) -> None:
    """Batches of 11 and more sequences of 8,192 tokens exceed a B200 and are not replayed; that of one is."""
    package = pytest.importorskip(library)
    pytest.importorskip("pyarrow")
    rows = peftplan.sweep("llama-3.2-1b", batch_size=[*range(160, 10, -1), 1], seq_len=8192, gpu=["t4", "b200"])
    frame = package.table(rows) if library == "pyarrow" else package.DataFrame(rows)
    peaks = frame["peak_allocated"].to_pylist() if library == "pyarrow" else frame["peak_allocated"].to_list()
    assert len(peaks) == rows.num_rows == 302
    assert peaks[0] != peaks[0] or peaks[0] is None
    assert peaks[-1] > 2**30


def test_a_grid_has_the_rows_of_a_sweep() -> None:
    for module in ("numpy", "pandas"):
        pytest.importorskip(module)
    cards = ["l4", "rtx-4090"]
    grid = peftplan.estimate("llama-3.2-1b", gpu=cards).at(batch_size=[[1], [16]], seq_len=[512, 1024])
    rows = peftplan.sweep("llama-3.2-1b", batch_size=[1, 16], seq_len=[512, 1024], gpu=cards).records()
    assert grid.records() == [{name: row[name] for name in grid.records()[0]} for row in rows]
    assert grid.num_rows == len(rows) == 8
    assert list(grid.to_dataframe()["verdict"]) == [row["verdict"] for row in rows]
    assert repr(grid).startswith("<Grid of 2 × 2 points over batch_size, seq_len on l4, rtx-4090: ")
    html = grid._repr_html_()
    assert html.count("<tr>") == 1 + 8
    (row,) = peftplan.estimate("gpt2").at(batch_size=[3]).records()
    assert "verdict" not in row
    assert row["batch_size"] == 3
