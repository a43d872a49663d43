"""ms-swift's rerankers against the tool on the emulated card, which plays the first rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from tools.rehearsed_jobs import read
from tools.rehearsed_swift import options, plan

ROWS = read(Path(__file__).with_name("swift_rerankers.jsonl"))


def _peaks(row: dict[str, Any]) -> dict[str, Any]:
    result = peftplan.estimate(**options(row)).to_dict()
    ranks = (result.get("distributed") or {}).get("ranks")
    peaks: dict[str, Any] = ranks[0] if ranks else result["memory"]
    return peaks


OF_LORA = {"allocated": 7.1e-4, "phase": 3.9e-3, "reserved": 0.021}
"""Of LoRA under ZeRO-2, as of ms-swift's embeddings of texts that share a row."""
OF_PADDED = {"allocated": 4e-3, "phase": 5e-3, "reserved": 0.043}
"""Of ModernBERT's texts, which are taken as padded, while the rehearsed ones fill `max_length`: for these transformers makes no
mask of the padding. Without it, a byte for each row and pair of tokens, phases are within 0.002 % and reserved bytes equal."""


@pytest.mark.parametrize("row", ROWS, ids=[" ".join(f"{key}={value}" for key, value in row["values"].items()) for row in ROWS])
def test_formulas_hold_what_rerankers_hold(row: dict[str, Any]) -> None:
    """Of a head that scores two words, whose gradient is as large as the table, or of a text part with a score of its own. The
    loss of a list takes as much as of points."""
    assert not plan(row).unsupported
    adapts_ranks = (row["values"]["tuner_type"], row["values"].get("deepspeed")) == ("lora", "zero2")
    limits = OF_LORA if adapts_ranks else {"allocated": 2e-4, "phase": 1e-3, "reserved": 2.1e-3}
    limits = OF_PADDED if plan(row).options.get("padding") else limits
    peaks = _peaks(row)
    assert peaks["peak_allocated"] == pytest.approx(row["allocated"], rel=limits["allocated"])
    assert peaks["peak_by_phase"] == pytest.approx(row["by_phase"], rel=limits["phase"])
    if peaks["peak_reserved"] is not None:
        assert peaks["peak_reserved"] == pytest.approx(row["reserved"], rel=limits["reserved"])


def test_a_table_beyond_the_bucket_leaves_reserved_bytes_open() -> None:
    """ms-swift's zero2 sums up gradients 200 M numbers at a time; Qwen3 4B's table has 388 M."""
    of_zero2 = [row for row in ROWS if row["values"].get("deepspeed") == "zero2"]
    assert [_peaks(row)["peak_reserved"] is None for row in of_zero2] == [False, False, True, False]
