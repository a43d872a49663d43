"""peft's published benchmark on Llama-3.2-3B, one run per method: the counts it recorded, against `peftplan.estimate`."""

from __future__ import annotations

import json
from typing import Any

import pytest

import peftplan
from peftplan.datafiles import DATA
from peftplan.methods import from_peft_config
from peftplan.methods.adaptation import NeedsPeftError
from peftplan.results.estimate import Estimate

MODEL = "llama-3.2-3b"
LORA_FA = "lora/llama-3.2-3B-rank32-lorafa"
ROWS = [json.loads(line) for line in (DATA / "published" / "peft_metamath.jsonl").read_text(encoding="utf-8").splitlines()]


def estimate(row: dict[str, Any]) -> Estimate:
    """By the row's adapter config; its LoRA-FA run has that of plain LoRA, and freezes A in the optimizer."""
    if row["adapter_config"] is None:
        return peftplan.estimate(MODEL, method="full")
    if row["experiment"] == LORA_FA:
        return peftplan.estimate(MODEL, method="lora-fa", r=row["adapter_config"]["r"], target_modules="peft-default")
    return peftplan.estimate(MODEL, peft_config=row["adapter_config"])


def needs_peft(row: dict[str, Any]) -> bool:
    try:
        from_peft_config(row["adapter_config"] or {"peft_type": "LORA"})
    except NeedsPeftError:
        return True
    return False


@pytest.mark.parametrize("row", ROWS, ids=[row["experiment"] for row in ROWS])
def test_counts_are_those_that_the_benchmark_recorded(row: dict[str, Any]) -> None:
    if needs_peft(row):
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
    e = estimate(row)
    assert (e.trainable_parameters, e.total_parameters) == (row["num_trainable_params"], row["num_total_params"])


def test_a_lora_config_without_its_optimizer_trains_a_too() -> None:
    """Of LoRA-FA's row, the adapter config alone says more: A of q_proj and v_proj, 32 × 3072 in 28 layers, trains as well."""
    row = next(row for row in ROWS if row["experiment"] == LORA_FA)
    e = peftplan.estimate(MODEL, peft_config=row["adapter_config"])
    assert e.trainable_parameters - row["num_trainable_params"] == 28 * 2 * 32 * 3072
    assert e.total_parameters == row["num_total_params"]


def test_all_methods_with_closed_formulas_in_the_benchmark_need_no_peft() -> None:
    closed = {row["peft_type"] for row in ROWS if not needs_peft(row)}
    assert {"FULL_FINETUNING", "ADALORA", "BOFT", "FOURIERFT", "IA3", "LOKR", "LORA"} <= closed
    assert {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"} <= closed
    assert len(ROWS) == 31


def test_default_targets_of_the_lora_family() -> None:
    """lora, qlora and dora adapt all linear layers; the others peft's own q and v, as the published LoRA-FA run did."""
    # B alone, on q (3072) and v (1024) of 28 layers at r 32: 28·32·(3072 + 1024) = 3,670,016
    assert peftplan.estimate("llama-3.2-3b", method="lora-fa", r=32).trainable_parameters == 3_670_016
    # A and B there: 28·32·(3072 + 3072 + 3072 + 1024) = 9,175,040
    for method in ("rslora", "lora+"):
        assert peftplan.estimate("llama-3.2-3b", method=method, r=32).trainable_parameters == 9_175_040
    # all seven: in + out of q, k, v, o, gate, up, down = 6144 + 4096 + 4096 + 6144 + 3·11264 = 54,272; 28·32·54,272 = 48,627,712
    for method in ("lora", "qlora"):
        assert peftplan.estimate("llama-3.2-3b", method=method, r=32).trainable_parameters == 48_627_712
