"""Buffers of an embedding's backward: against torch's own allocator, and a rehearsed job with them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.tape.sorted_indices import SortedRows, sorted_dim, sorted_rows

np = pytest.importorskip("numpy")


@pytest.mark.parametrize(
    ("n", "table", "width", "parts_bytes", "sums_bytes"),
    [(4096, 128256, 2048, 36_040, 36_904_960), (4096, 2, 512, 3_288, 841_728), (4000, 1000, 512, 11_200, 2_867_200)],
)
def test_buffers_are_those_that_torch_allocates(n: int, table: int, width: int, parts_bytes: int, sums_bytes: int) -> None:
    """int64 counts and fp32 sums of the parts, in the memory history of torch 2.13's CUDA build on an emulated card."""
    parts = sorted_rows("parts", n=n, v=table)
    assert (8 * parts, 4 * width * parts) == (parts_bytes, sums_bytes)
    assert sorted_rows("segments", n=n, v=table) == min(n, table)


def test_few_indices_are_not_sorted() -> None:
    rows = SortedRows(("b", "s"), 50257, "parts")
    assert rows.at({"b": 3, "s": 1024}) == 0
    assert rows.at({"b": 1, "s": 3073}) == 307 + 3073
    many: dict[str, Any] = {"b": np.array([3, 4]), "s": 1024}
    assert np.asarray(rows.at(many)).tolist() == [0, 409 + 4096]
    assert (sorted_dim((20,), 20, "parts"), sorted_dim(("b", 20), 20, "parts")) == (0, "parts of b·20 in 20")
    assert pickle.loads(pickle.dumps(rows)).at({"b": 4, "s": 1024}) == 409 + 4096


def test_full_fine_tuning_peaks_with_the_sort() -> None:
    """TRL's SFTTrainer as rehearsed, 4,096 tokens: at the end of backward all gradients are alive. It was 0.354 % low."""
    rows = json.loads((Path(__file__).parents[1] / "rehearse" / "rehearsals.json").read_text(encoding="utf-8"))
    rehearsed = next(row for row in rows if row["program"] == "sft_full")
    estimate = peftplan.estimate("llama-3.2-1b", method="full", trainer="trl", batch_size=2, seq_len=2048)
    assert estimate.to_dict()["memory"]["peak_allocated"] == pytest.approx(rehearsed["peak_allocated"], abs=2**13)
