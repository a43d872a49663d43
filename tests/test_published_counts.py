"""Counts that other people's runs printed, against `peftplan.estimate`: every row equal, or the stated difference, exactly.

The witnesses are the printed numbers. Sums in the data (`plus`, `trainable_sum`, `total_sum`) are written out by hand from the
layers' sizes; they are evaluated here, so that none is only claimed.
"""

from __future__ import annotations

import ast
import importlib.util
import operator
from collections.abc import Callable
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import peftplan
from peftplan.job.sources import load_config
from peftplan.results.estimate import Estimate

ROOT = Path(__file__).resolve().parents[1]


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_counts", ROOT / "tools" / "published_counts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


published_counts = tool()
ROWS: list[dict[str, Any]] = published_counts.load_rows()
CALLED = [row for row in ROWS if "call" in row]
LEFT_OUT = [row for row in ROWS if "not_expressible" in row]


def saved(e: Estimate) -> int:
    """Elements of the copies that modules_to_save makes."""
    return sum(t.copies * prod(t.shape) for t in e.adaptation.added if ".modules_to_save" in t.name)


def packed(e: Estimate) -> int:
    """The total with two 4-bit elements to a byte: `numel()` of bitsandbytes' uint8 weights."""
    return e.total_parameters - e.parameters.quantized // 2


TRAINABLE: dict[str, Callable[[Estimate], int]] = {
    "equal": lambda e: e.trainable_parameters,
    "original-head-too": lambda e: e.trainable_parameters + saved(e),
}
TOTAL: dict[str, Callable[[Estimate], int]] = {
    "equal": lambda e: e.total_parameters,
    "head-in-place": lambda e: e.total_parameters - saved(e),
    "packed-4bit": packed,
    "without-adapter": lambda e: e.total_parameters - e.adaptation.num_added,
    "packed-4bit-without-adapter": lambda e: packed(e) - e.adaptation.num_added,
}


def evaluate(text: str) -> int:
    """A sum of products of whole numbers."""
    signs: dict[type[ast.operator], Callable[[int, int], int]] = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
    }

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return signs[type(node.op)](value(node.left), value(node.right))
        assert isinstance(node, ast.Constant)
        assert type(node.value) is int
        return node.value

    return value(ast.parse(text, mode="eval").body)


def read(e: Estimate, reading: Any, known: dict[str, Callable[[Estimate], int]]) -> int:
    return known["equal"](e) + evaluate(reading["plus"]) if isinstance(reading, dict) else known[reading](e)


def model_of(call: dict[str, Any]) -> Any:
    """A built-in name, a config, or a built-in's config with some fields replaced."""
    model = call["model"]
    if not isinstance(model, dict) or "built_in" not in model:
        return model
    base = load_config(model["built_in"])
    return {**base, **{k: {**base[k], **v} if isinstance(v, dict) else v for k, v in model["config"].items()}}


@pytest.mark.parametrize("row", CALLED, ids=[row["id"] for row in CALLED])
def test_a_printed_count_is_ours(row: dict[str, Any]) -> None:
    if row.get("extra") == "trace":
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    e = peftplan.estimate(model_of(row["call"]), **{k: v for k, v in row["call"].items() if k != "model"})
    assert read(e, row["reading"]["trainable"], TRAINABLE) == row["trainable"]
    if "total" in row:
        assert read(e, row["reading"]["total"], TOTAL) == row["total"]


@pytest.mark.parametrize("row", LEFT_OUT, ids=[row["id"] for row in LEFT_OUT])
def test_what_no_call_says_is_the_sum_that_the_row_gives(row: dict[str, Any]) -> None:
    gap = row["not_expressible"]
    step = gap.get("rounded_to", 1)  # ms-swift prints millions with four decimals
    if "trainable_sum" in gap:
        assert (evaluate(gap["trainable_sum"]) + step // 2) // step * step == row["trainable"]
    if "total_sum" in gap:
        assert evaluate(gap["total_sum"]) == row["total"]
    assert "trainable_sum" in gap or gap["reason"] == "config unknown"


def test_every_row_is_compared_or_left_out_with_a_reason() -> None:
    assert len(ROWS) == len({row["id"] for row in ROWS}) == 117
    for row in ROWS:
        assert ("call" in row) != ("not_expressible" in row), row["id"]
        if "call" in row:
            assert ("total" in row) == ("total" in row["reading"]), row["id"]
            assert published_counts.kind(row) != "differs" or row["because"], row["id"]
        assert row.get("url") or (row["repo"] and row["path"] and row["licence"]), row["id"]


def test_every_reading_is_used_and_explained() -> None:
    used = {name for row in ROWS for name in published_counts.readings(row)}
    assert used == set(published_counts.READINGS) == {*TRAINABLE, *TOTAL, "plus"} - {"equal"}


def test_the_page_is_what_the_tool_writes() -> None:
    assert published_counts.OUTPUT.read_text(encoding="utf-8") == published_counts.page(ROWS), "run tools/published_counts.py"


def test_a_wrong_count_would_fail() -> None:
    """The comparison can fail: one rank more is another number."""
    row = next(row for row in CALLED if row["id"] == "tc0237")
    e = peftplan.estimate(row["call"]["model"], method="lora", r=9, target_modules=row["call"]["target_modules"])
    assert e.trainable_parameters - row["trainable"] == 32 * 2 * (4096 + 4096)
