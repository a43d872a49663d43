"""Qwen2.5 1.5B, all of whose weights train by GRPO in layers that torch compiles, and which writes the completions itself."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from peftplan import estimate
from peftplan.datafiles import load
from peftplan.job import compiled_layers
from peftplan.job.configs.read import read_text
from peftplan.job.sources import load_config

MODEL = "qwen2.5-1.5b"
GRPO: dict[str, Any] = {
    "method": "full", "trainer": "trl-grpo", "kernels": "unsloth-rows", "loss": "unsloth", "gradient_checkpointing": True,
    "offload_checkpoints": True, "use_reentrant": True, "autocast": "none", "dtype": "bf16", "optim": "adamw_8bit",
    "batch_size": 1, "num_generations": 8, "beta": 0.0,
}  # fmt: skip


def three_layers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The config of three layers, of which the record of the model holds too."""
    config = {**copy.deepcopy(load_config(MODEL)), "num_hidden_layers": 3}
    (row,) = (row for row in load("compiled_layers.json", list[dict[str, Any]]) if row["model"] == MODEL)
    monkeypatch.setattr(compiled_layers, "load", lambda *_: [{**row, "model": config["model_type"]}])
    return config


def test_prompts_and_a_row_as_unsloth_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 prompts of 2,948 tokens are read at once, before 40 more are written of each; the step trains on one row after another.

    An emulated A100: unsloth and unsloth_zoo 2026.10.9, transformers 5.17.0, trl 1.15.0, torch 2.13.0. In forward two hidden
    states more are alive, whose copies to the host are under way.
    """
    options = {**GRPO, "seq_len": 2988, "max_completion_length": 40, "gradient_accumulation_steps": 16}
    peaks = estimate(three_layers(monkeypatch), gpu="a100-80gb", **options).peaks
    assert peaks is not None
    assert peaks.by_phase["generate"] == pytest.approx(5_668_376_576, rel=0.0005)
    assert peaks.by_phase["forward"] == pytest.approx(3_838_315_008, rel=0.006)
    assert peaks.by_phase["backward"] == pytest.approx(4_627_807_232, rel=0.0005)
    assert peaks.reserved == pytest.approx(5_855_248_384, rel=0.005)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"batch_size": 8}, "that it packs"),
        ({"beta": 0.1}, "with a reference"),
        ({"use_vllm": True}, "beside vLLM"),
        ({"seq_len": 6000, "max_completion_length": 5000}, "more than 4,096 tokens with a head that trains"),
    ],
)
def test_what_of_it_has_no_formula(changed: dict[str, Any], why: str) -> None:
    result = estimate(MODEL, **{**GRPO, "seq_len": 1024, "max_completion_length": 256, **changed})
    assert result.peaks is None
    assert why in result.not_modelled[0]


NOTEBOOK = """
from unsloth import FastLanguageModel
max_seq_length = 4096
model, tokenizer = FastLanguageModel.from_pretrained(model_name="unsloth/Qwen2.5-1.5B-Instruct", max_seq_length=max_seq_length,
    load_in_4bit=False, full_finetuning=True, offload_embedding=True)
args = GRPOConfig(optim="adamw_8bit", per_device_train_batch_size=1, gradient_accumulation_steps={accumulated}, num_generations=8,
    max_prompt_length=longest + 1, max_completion_length=max_seq_length - longest, max_steps=100)
trainer = GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=[reward], args=args, train_dataset=dataset)
trainer.train()
"""


@pytest.mark.parametrize(
    ("accumulated", "installed", "peak"),
    [(64, "", True), (1, "", False), (64, "!pip install transformers==4.56.2\n", False)],
)
def test_its_notebook(accumulated: int, installed: str, peak: bool) -> None:
    """With one micro batch the eight completions of a prompt are a batch, whose rows are packed; nothing was rehearsed beside
    transformers 4."""
    cell = {"cell_type": "code", "source": [installed + NOTEBOOK.format(accumulated=accumulated)]}
    plan = read_text(json.dumps({"cells": [cell]}), file="a.ipynb")
    assert (not plan.unsupported) is peak
    assert estimate(config=plan).trainable_parameters == 1_543_714_304
    assert (estimate(config=plan).peaks is not None) is peak
