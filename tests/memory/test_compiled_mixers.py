"""Recorded layers with Mamba 2: torch compiles what stands around the kernels of mamba-ssm, for Unsloth."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from peftplan import estimate
from peftplan.datafiles import load
from peftplan.job import compiled_layers
from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_text
from peftplan.job.sources import load_config
from tests.memory.test_compiled_layers import GRANITE

ROWS: list[dict[str, Any]] = load("compiled_layers.json", list)
TYPES = ["mamba", "mamba", "attention", "mamba"]
OF_GRANITE = [
    ((2, 2048), (1_380_593_152, 1_602_834_432, 1_044_920_320), 1_860_173_824),
    ((2, 1400), (1_332_719_104, 1_424_099_328, 1_034_242_048), None),
]
"""Batch size and length, two micro batches; peaks of phases in the second step and reserved bytes of Unsloth's FastLanguageModel
over four layers of Granite 4.0 h-micro on an emulated A100: unsloth and unsloth_zoo 2026.10.9, transformers 4.56.2, trl 0.22.2,
torch 2.10.0, causal-conv1d 1.6.2 and mamba-ssm 2.3.2, with shorter rows 2.2.5, whose kernels were not timed. The record is of
these rows; of partial sums of Mamba 2 there are as many as keep a card busy, which the length decides."""


def four_layers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The config of four layers, of which the record has the third."""
    config = {**copy.deepcopy(load_config("granite-4.0-h-micro")), "dtype": "bfloat16"}
    config |= {"num_hidden_layers": len(TYPES), "layer_types": TYPES}
    (row,) = (row for row in ROWS if row["model"] == "granite-4.0-h-micro")
    others = [([TYPES.index("attention")], *events) for _, *events in row["others"]]
    adapted = dict.fromkeys(row["adapted"], TYPES.count("attention"))
    rows = [{**row, "model": config["model_type"], "others": others, "adapted": adapted}]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: rows)
    return config


@pytest.mark.parametrize(("sizes", "by_phase", "reserved"), OF_GRANITE)
def test_a_mixer_between_two_graphs(
    sizes: tuple[int, int], by_phase: tuple[int, ...], reserved: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mamba 2 allocates for whole chunks of each row, and no batch becomes one row: a state would go from row to row."""
    options = {**GRANITE, "kernels": "unsloth-rows", "gradient_accumulation_steps": 2}
    peaks = estimate(four_layers(monkeypatch), **options, batch_size=sizes[0], seq_len=sizes[1]).peaks
    assert peaks is not None
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.002)
    if reserved is not None:
        assert peaks.reserved == pytest.approx(reserved, rel=0.025)


NOTEBOOK = """
!pip install transformers==4.56.2 trl==0.22.2
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/granite-4.0-h-micro", max_seq_length=2048, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=32, use_gradient_checkpointing="unsloth", target_modules=["q_proj", "k_proj",
    "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "shared_mlp.input_linear", "shared_mlp.output_linear"])
trainer = SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=60))
trainer.train()
"""


def of_notebook(text: str) -> ConfigPlan:
    """The plan of a notebook of one cell."""
    return read_text(json.dumps({"cells": [{"cell_type": "code", "source": [text]}]}), file="a.ipynb")


def test_the_notebook_of_granite_has_a_peak() -> None:
    """1,703,936 trainable parameters, as its output says."""
    plan = of_notebook(NOTEBOOK)
    assert not plan.unsupported
    assert "mamba-ssm" in plan.assumed["kernels"]
    result = estimate(config=plan)
    assert (result.trainable_parameters, result.bound) == (1_703_936, None)
    assert result.peaks is not None


@pytest.mark.parametrize(
    ("written", "instead"),
    [("==4.56.2", "==5.3.0"), ("h-micro", "h-tiny"), ("r=32", "r=16"), ("max_steps=60", "packing=True"), ("=False)", "=True)")],
)
def test_other_notebooks_of_granite_have_no_record(written: str, instead: str) -> None:
    result = estimate(config=of_notebook(NOTEBOOK.replace(written, instead)))
    assert result.peaks is None or result.bound is not None
