"""What peftplan reads of axolotl's config, against `axolotl train` with it on the emulated card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.errors import RefusedError
from peftplan.job.configs.read import read_values
from tests.job.configs.published import plan as published
from tests.job.configs.published import records
from tools.rehearsed_axolotl import options, plan
from tools.rehearsed_jobs import read

ROWS = read(Path(__file__).with_name("axolotl.jsonl"))
EXACT = [row for row in ROWS if not plan(row).unsupported]
LARGEST = {"allocated": 0.002, "reserved": 0.002}
"""Per cent."""
FIGURES = ("allocated", "reserved", "by_phase", "reserved_by_phase")


@pytest.mark.parametrize("row", EXACT, ids=[row["values"]["base_model"] for row in EXACT])
def test_formulas_hold_what_axolotl_holds(row: dict[str, Any]) -> None:
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    drift = {what: 100 * (getattr(peaks, what) / row[what] - 1) for what in LARGEST}
    assert {what: number for what, number in drift.items() if abs(number) > LARGEST[what]} == {}


def test_a_pattern_that_no_name_of_an_adapted_model_has_leaves_nothing_to_train() -> None:
    """`^model.` against `base_model.model.model.`: axolotl freezes the adapter, and says so in its log."""
    for row in [row for row in ROWS if "unfrozen_parameters" in row["values"]]:
        estimate = peftplan.estimate(**options(row))
        assert estimate.trainable_parameters == 0
        sums = estimate.ledger.by_category()
        assert (sums["gradients"], sums["optimizer_states"]) == (0, 0)
    published_plans = [published(record) for record in records("axolotl") if "gemma-3-1b-qlora" in record["path"]]
    assert [each.options["freeze_adapter"] for each in published_plans] == [True]


def test_weights_drawn_anew_take_what_loaded_ones_take() -> None:
    drawn, loaded = (row for row in ROWS if "reinit_weights" in row["values"])
    assert [drawn[what] for what in FIGURES] == [loaded[what] for what in FIGURES]
    assert plan(drawn).ignored["reinit_weights"].at == "loaders/model.py:1071"


def test_fsdp2_as_axolotl_runs_it_has_no_peak() -> None:
    """It replaces accelerate's `fsdp2_prepare_model`: rehearsed, a full fine-tuning held 20 % less, and a LoRA 1.3 % more."""
    values: dict[str, Any] = {"base_model": "Qwen/Qwen2.5-0.5B", "sequence_len": 512, "micro_batch_size": 1, "fsdp_version": 2}
    plan = read_values({**values, "fsdp_config": {"reshard_after_forward": True}}, file="a.yml")
    assert peftplan.estimate(config=plan).not_modelled[0].startswith("a step with FSDP2 over 8 GPUs and trainer")
    with pytest.raises(RefusedError, match="not FSDP2 as Trainer of axolotl"):
        peftplan.estimate(config=plan, engine="trace")
