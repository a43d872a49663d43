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
    frame = polars.DataFrame(rows, infer_schema_length=None)
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
    frame = polars.DataFrame(rows, infer_schema_length=None)
    assert frame.height == rows.num_rows == 8
    assert frame["needed_bytes"].dtype == polars.Int64
    assert frame["batch_size"].to_list() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert polars.concat(polars.DataFrame(chunk) for chunk in rows.chunks()).equals(frame)
