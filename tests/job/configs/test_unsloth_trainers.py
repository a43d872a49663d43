"""Notebooks of Unsloth that train with ORPO, or with GRPO over a base in FP8."""

from __future__ import annotations

import json

import pytest

import peftplan
from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_text


def notebook(*cells: str) -> ConfigPlan:
    return read_text(json.dumps({"cells": [{"cell_type": "code", "source": [cell]} for cell in cells]}), file="a.ipynb")


ORPO = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/llama-3-8b-bnb-4bit", max_seq_length=4096, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing="unsloth")
from trl import ORPOConfig, ORPOTrainer
trainer = ORPOTrainer(model=model, train_dataset=dataset, tokenizer=tokenizer, args=ORPOConfig(
    max_length=2048, {lengths}per_device_train_batch_size=2, gradient_accumulation_steps=4, beta=0.1, optim="adamw_8bit",
    max_steps=30, output_dir="outputs"))
trainer.train()
"""


def test_pairs_of_orpo_are_padded_rows() -> None:
    """unsloth 2026.10.9, models/rl_replacements.py (`_unsloth_pref_chunked_forward`)."""
    plan = notebook(ORPO.format(lengths="max_prompt_length=1024, max_completion_length=1024, "))
    assert not plan.unsupported
    assert (plan.options["trainer"], plan.options["seq_len"], plan.options["max_completion_length"]) == ("trl-orpo", 2048, 1024)
    assert "unsloth.padding_free" not in plan.options["kernels"]
    result = peftplan.estimate(config=plan)
    assert (result.peaks is not None, result.bound) == (True, None)


def test_orpo_without_the_length_of_completions_leaves_no_peak() -> None:
    """How many tokens reach the head is not known then."""
    assert "args.call" in notebook(ORPO.format(lengths="")).unsupported


DPO = """
from unsloth import FastLanguageModel, PatchDPOTrainer
PatchDPOTrainer()
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/zephyr-sft-bnb-4bit", max_seq_length=4096, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=64, use_gradient_checkpointing="unsloth")
from trl import DPOConfig, DPOTrainer
trainer = DPOTrainer(model=model, ref_model=None, beta=0.1, train_dataset=dataset, tokenizer=tokenizer, max_prompt_length=512,
    max_length=1024, args=DPOConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4, optim="adamw_8bit"))
trainer.train()
"""


def test_pairs_of_dpo_return_the_hidden_states_of_every_layer() -> None:
    """trl 0.22.2, trainer/dpo_trainer.py:1526 (`output_hidden_states`)."""
    plan = notebook(DPO)
    assert not plan.unsupported
    assert (plan.options["trainer"], plan.options["seq_len"], plan.options["kernels"]) == ("trl-dpo", 1024, "unsloth-padded")
    assert "0.22.2" in plan.assumed["trl"]
    assert "2.13" in plan.assumed["torch"]
    result = peftplan.estimate(config=plan)
    assert (result.peaks is not None, result.bound, result.trainable_parameters) == (True, None, 167_772_160)


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("max_length=1024, ", ""),
        ("ref_model=None", "ref_model=other"),
        ("load_in_4bit=True", "load_in_4bit=False"),
        ('optim="adamw_8bit"', 'optim="adamw_8bit", precompute_ref_log_probs=True'),
    ],
)
def test_dpo_that_was_not_rehearsed_leaves_no_peak(written: str, instead: str) -> None:
    """Rows of a length that is not said; another model as reference; weights in 16 bits; no reference in a step."""
    assert "args.call" in notebook(DPO.replace(written, instead)).unsupported


GRPO_IN_FP8 = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="{name}", max_seq_length=1024, load_in_4bit=False, fast_inference={fast}, load_in_fp8=True)
model = FastLanguageModel.get_peft_model(model, r=32, use_gradient_checkpointing="unsloth")
args = GRPOConfig(per_device_train_batch_size=4, num_generations=4, max_prompt_length=256, max_completion_length=768,
    optim="adamw_8bit", max_steps=50)
trainer = GRPOTrainer(model=model, reward_funcs=[correct], args=args, train_dataset=dataset)
trainer.train()
"""


@pytest.mark.parametrize("name", ["unsloth/Qwen3-8B", "unsloth/Llama-3.2-1B-Instruct"])
def test_a_base_in_fp8_beside_vllm(name: str) -> None:
    """The notebook of Llama 3.2 1B printed `vLLM loading unsloth/Llama-3.2-1B-Instruct-FP8-Block`."""
    plan = notebook(GRPO_IN_FP8.format(name=name, fast=True))
    assert not plan.unsupported
    assert (plan.options["quant"], plan.options["method"]) == ("fp8", "lora")
    assert "8.9" in plan.assumed["quant"]
    result = peftplan.estimate(config=plan)
    assert (result.peaks is not None, result.bound) == (True, None)


@pytest.mark.parametrize(("name", "fast"), [("unsloth/Qwen3-8B", False), ("unsloth/Llama-3.2-1B", True)])
def test_a_base_that_unsloth_quantizes_to_fp8_itself_leaves_no_peak(name: str, fast: bool) -> None:
    """Without vLLM, and where no repository stores the weights so (models/loader_utils.py:1169, :2023)."""
    assert "load.load_in_fp8" in notebook(GRPO_IN_FP8.format(name=name, fast=fast)).unsupported


def test_a_function_that_writes_completions_beside_vllm() -> None:
    """What it writes is assumed to be as long as the lengths say. Without vLLM Unsloth shares the prompts of completions, which
    no formula knows."""
    source = GRPO_IN_FP8.replace("reward_funcs=", "rollout_func=rollout, reward_funcs=").replace("_fp8=True", "_fp8=False")
    with_vllm, without = (notebook(source.format(name="unsloth/Qwen3-4B", fast=fast)) for fast in (True, False))
    assert not with_vllm.unsupported
    assert "does not enforce" in with_vllm.assumed["seq_len"]
    assert "trainer.rollout_func" in without.unsupported
