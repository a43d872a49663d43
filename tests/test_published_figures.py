"""Memory that other projects printed, on docs/published-figures.md: each figure has its source, and a reason where it is off."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import peftplan
from peftplan.results.peaks import Peaks
from peftplan.units import GIB
from tests.job.configs.published import plan, records
from tools import published_figures
from tools.published_figures import (
    DATA,
    NEAR,
    PAGE,
    REASONS,
    UNITS,
    beside,
    command,
    estimated,
    job_of_script,
    length_that_meets,
    load_rows,
    meets,
    reserved_by_loading,
)

ROWS = load_rows()
OF_TORCHTUNE = [row for row in ROWS if row["tool"] == "torchtune"]
OF_SWIFT = [row for row in ROWS if row["tool"] == "ms-swift" and "reason" in row]
COMMIT = re.compile(r"\b[0-9a-f]{9}\b")


def test_each_figure_has_its_source() -> None:
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    assert all(row["commit"] and row["path"] and row["licence"] for row in ROWS)
    assert {row["unit"] for row in ROWS if "printed" in row} <= UNITS.keys()


@pytest.mark.parametrize("row", OF_TORCHTUNE, ids=lambda row: row["id"])
def test_a_figure_that_is_off_has_a_reason(row: dict[str, object]) -> None:
    """Beside the rehearsal of the release that printed it, or where none ran."""
    rehearsed = row.get("rehearsed")
    assert (rehearsed is None) or row["versions"]
    _, off = beside(row["printed"], rehearsed, row["unit"])  # type: ignore[arg-type]
    assert row.get("why") or (rehearsed is not None and abs(float(off.removesuffix(" %"))) <= NEAR)


def peaks_of(row: dict[str, Any], *, day: bool = False, **options: int) -> Peaks | None:
    source, of_data = job_of_script(row, day=day)
    result = estimated(source, **(of_data | options))
    return None if isinstance(result, str) else result.peaks


def gib(row: dict[str, Any], *, day: bool = False, **options: int) -> float:
    peaks = peaks_of(row, day=day, **options)
    assert peaks is not None
    assert peaks.reserved is not None
    return float(peaks.reserved / GIB)


def test_each_figure_with_a_number_has_one_reason() -> None:
    stated = [row for row in ROWS if row["tool"] == "torchtune" and ("job" in row or "rehearsed" in row)]
    assert all(row["reason"] in REASONS for row in [*stated, *OF_SWIFT])
    for row in ROWS:
        if row["tool"] == "ms-swift" and "reason" not in row and not command(row)["program"].startswith("megatron"):
            peaks = peaks_of(row)
            assert peaks is None or peaks.reserved is None, row["id"]


@pytest.mark.parametrize("row", OF_SWIFT, ids=lambda row: row["id"])
def test_a_reason_of_a_script_can_be_shown(row: dict[str, Any]) -> None:
    """`within` and `lengths` by the estimate, others by what they name; none stands beside a figure that the estimate meets."""
    reason = row["reason"]
    assert meets(row["printed"], gib(row)) == (reason in ("within", "lengths"))
    if reason == "lengths":  # the longest row meets it, and what the script admits does not
        assert row["longest"]["of"].startswith("line ")
        assert not meets(row["printed"], gib({key: value for key, value in row.items() if key != "longest"}))
    if reason in ("changed", "copied"):
        assert COMMIT.search(row["shown"])
    if reason == "pictures":
        peaks = peaks_of(row)
        assert peaks is not None
        assert peaks.scope == "text"
        assert gib(row) < row["printed"]
    if reason == "release":
        assert "day" in row or "rehearsed" in row or re.search(r"\.py:\d+", row["shown"])


def test_no_card_of_80_gb_gives_80_gib() -> None:
    cards = [card for card in json.loads((DATA.parents[1] / "gpus.json").read_text("utf-8"))["gpus"] if card["marketed_gb"] == 80]
    most = max(total["mib"] for card in cards for total in card["cuda_total_mib"])
    assert round(most / 1024) == 79
    assert {row["printed"] for row in OF_SWIFT if row["reason"] == "card"} == {80.0}


def test_a_day_explains_a_figure_by_a_length_that_the_script_admits() -> None:
    (row,) = [row for row in OF_SWIFT if row["reason"] == "release" and "day" in row]
    length = length_that_meets(row)
    assert length is not None
    assert length <= 2048
    assert meets(row["printed"], gib(row, day=True, seq_len=length))
    assert not meets(row["printed"], gib(row, seq_len=2048))


def test_ms_swift_3_reserves_what_is_estimated_of_rows_of_that_length() -> None:
    """Where nothing but rows of 131 tokens decides: LoRA on one GPU and on two; none of it is what the comments say."""
    rehearsed = {row["id"]: row for row in OF_SWIFT if "rehearsed" in row and row["longest"]["tokens"] == 131}
    for name in ("train/multi-gpu/ddp/train", "train/streaming/lazy_tokenize"):
        (row,) = [row for key, row in rehearsed.items() if name in key]
        assert gib(row) == pytest.approx(row["rehearsed"] / GIB, rel=0.002)


def test_torchtune_printed_what_its_recipe_reserves() -> None:
    """The QLoRA tutorial of release 0.1.0 prints 9.13 GB after loading and 9.29 GB of training; loading LoRA allocates 13.96."""
    rehearsed = {row["id"].rpartition("/")[2]: row["rehearsed"] / 1e9 for row in OF_TORCHTUNE if "-tutorial/" in row["id"]}
    printed = {"qlora-init": 9.13, "qlora": 9.29, "lora-init": 13.98, "lora-init-allocated": 13.96}
    assert {name: round(rehearsed[name], 2) for name in printed} == printed


@pytest.mark.parametrize(
    ("notebook", "loaded"),
    [("Llama3_(8B)-Alpaca", 5.594), ("Phi_3_Medium-Conversational", 7.504), ("Phi_4-Conversational", 10.043)],
)
def test_unsloth_printed_what_loading_reserves(notebook: str, loaded: float) -> None:
    (record,) = [record for record in records("unsloth") if record["path"] == f"nb/{notebook}.ipynb"]
    peaks = peftplan.estimate(config=plan(record)).peaks
    assert peaks is not None
    reserved = reserved_by_loading(peaks)
    assert reserved is not None
    assert record["measured"]["start_reserved_gb"] == loaded
    assert reserved / 2**30 == pytest.approx(loaded, rel=0.005)


def test_the_page_shows_each_row() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert f"`{DATA.relative_to(published_figures.ROOT)}`" in text
    assert [row["id"] for row in ROWS if "what" in row and f"| {row['what']} | " not in text] == []
