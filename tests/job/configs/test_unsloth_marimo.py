"""Unsloth's notebooks for marimo: nothing pins torch there, and a newest one compiles each layer of a padded batch."""

from __future__ import annotations

import json
from textwrap import indent

import pytest

import peftplan
from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_text
from tests.job.configs.test_unsloth_trainers import DPO, ORPO

SFT = """
{settings}from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Qwen2.5-Coder-14B-Instruct", max_seq_length=2048, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, use_gradient_checkpointing="unsloth")
from trl import SFTConfig, SFTTrainer
trainer = {trainer}(model=model, train_dataset=dataset{collator}, args=SFTConfig(
    per_device_train_batch_size=1, max_steps=60, optim="paged_adamw_8bit"{arguments}))
trainer.train()
"""
COLLATOR = ", data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer)"
OFF = 'import os; os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"\n'


def marimo(program: str) -> ConfigPlan:
    script = f"import marimo\napp = marimo.App()\n\n@app.cell\ndef _():\n{indent(program, '    ')}    return\n"
    return read_text(script, file="a.py")


def test_pairs_of_dpo_are_those_of_the_notebook_for_colab() -> None:
    """The same program, whose peak is of torch 2.13 in both."""
    notebook = read_text(json.dumps({"cells": [{"cell_type": "code", "source": [DPO]}]}), file="a.ipynb")
    plan = marimo(DPO)
    assert (plan.unsupported, plan.options) == ({}, notebook.options)
    assert peftplan.estimate(config=plan).peaks == peftplan.estimate(config=notebook).peaks


@pytest.mark.parametrize(
    ("settings", "trainer", "collator", "arguments", "compiled"),
    [
        ("", "SFTTrainer", COLLATOR, "", True),
        ("", "SFTTrainer", "", ", padding_free=False", True),
        ("", "Trainer", "", "", True),
        ("", "SFTTrainer", "", "", False),
        ("", "SFTTrainer", COLLATOR, ", padding_free=True", False),
        (OFF, "SFTTrainer", COLLATOR, "", False),
    ],
)
def test_layers_of_padded_rows_are_compiled(settings: str, trainer: str, collator: str, arguments: str, compiled: bool) -> None:
    """unsloth 2026.10.9, models/llama.py:3431, trainer.py:1975; in one row, and where the environment says so, none is."""
    plan = marimo(SFT.format(settings=settings, trainer=trainer, collator=collator, arguments=arguments))
    assert not plan.unsupported
    assert (plan.options["kernels"] == "unsloth-padded") is compiled
    assert ("2.13" in plan.assumed.get("torch", "")) is compiled


def test_pairs_of_orpo_run_compiled_layers() -> None:
    plan = marimo(ORPO.format(lengths="max_prompt_length=1024, max_completion_length=1024, "))
    assert (plan.unsupported, plan.options["kernels"], plan.options["trainer"]) == ({}, "unsloth-padded", "trl-orpo")
    assert peftplan.estimate(config=plan).peaks is not None


@pytest.mark.parametrize("name", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_nothing_is_known_where_torch_compiles_nothing(name: str) -> None:
    for value, unsupported in (("1", {name}), ("0", set())):
        settings = f'import os; os.environ["{name}"] = "{value}"\n'
        plan = marimo(SFT.format(settings=settings, trainer="SFTTrainer", collator=COLLATOR, arguments=""))
        assert set(plan.unsupported) == unsupported
