"""Gemma 3 1B that writes completions itself and trains on them in layers that torch compiles, as its GRPO notebook does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peftplan import estimate
from peftplan.job.configs.read import read_text

GRPO: dict[str, Any] = {
    "method": "lora", "r": 8, "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "trainer": "trl-grpo",
    "kernels": "unsloth-rows", "loss": "unsloth", "gradient_checkpointing": True, "offload_checkpoints": True, "autocast": "bf16",
    "use_reentrant": True, "adapter_dtype": "fp32", "optim": "adamw_torch_fused", "batch_size": 4, "num_generations": 4,
}  # fmt: skip


def test_rows_of_completions_as_unsloth_ran() -> None:
    """Four rows of 895 tokens and 40 more on an emulated A100: unsloth and unsloth_zoo 2026.10.9, transformers 5.17.0, trl
    1.15.0, torch 2.13.0. The second step timed kernels once more in forward, behind which the loss took 2,322,246,086 bytes."""
    peaks = estimate("gemma-3-1b-it", **{**GRPO, "seq_len": 935, "max_completion_length": 40}).peaks
    assert peaks is not None
    assert peaks.by_phase["forward"] == pytest.approx(2_322_246_086, rel=0.0025)
    assert peaks.by_phase["backward"] == pytest.approx(2_543_169_536, rel=0.002)
    assert peaks.reserved == pytest.approx(2_889_875_456, rel=0.001)


def test_the_rows_of_its_notebook_as_unsloth_ran() -> None:
    """Four prompts of 256 tokens and completions of 768, which a `rollout_func` gave. What generation leaves in the cache, the
    estimate reserves besides."""
    peaks = estimate("gemma-3-1b-it", **{**GRPO, "seq_len": 1024, "max_completion_length": 768}).peaks
    assert peaks is not None
    assert peaks.by_phase["forward"] == pytest.approx(2_707_993_088, rel=0.0001)
    assert peaks.by_phase["backward"] == pytest.approx(2_579_158_016, rel=0.0001)
    assert peaks.reserved == pytest.approx(2_868_903_936, rel=0.02)


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"seq_len": 512}, "that it packs"), ({"beta": 0.1}, "with a reference"), ({"r": 16}, "not recorded")],
)
def test_what_of_it_has_no_formula(changed: dict[str, Any], why: str) -> None:
    """Rows up to the window of 512 tokens are packed, or share their prompt (unsloth_zoo, rl_replacements.py:3135, :3219)."""
    result = estimate("gemma-3-1b-it", **{**GRPO, "seq_len": 1024, "max_completion_length": 256, **changed})
    assert result.peaks is None
    assert why in result.not_modelled[0]


NOTEBOOK = """
from unsloth import FastModel
model, tokenizer = FastModel.from_pretrained(model_name="unsloth/gemma-3-1b-it", max_seq_length=1024, load_in_4bit=False)
model = FastModel.get_peft_model(model, finetune_vision_layers=False, r=8, lora_alpha=8, lora_dropout=0, bias="none")
args = GRPOConfig(optim="adamw_torch_fused", per_device_train_batch_size=1, gradient_accumulation_steps=1, num_generations=4,
    max_prompt_length=256, max_completion_length={completion}, max_steps=50)
trainer = GRPOTrainer(model=model, reward_funcs=[correct], args=args, train_dataset=dataset)
trainer.train()
"""


@pytest.mark.parametrize(("completion", "peak"), [(768, True), (256, False)])
def test_its_notebook(completion: int, peak: bool) -> None:
    cell = {"cell_type": "code", "source": [NOTEBOOK.format(completion=completion)]}
    plan = read_text(json.dumps({"cells": [cell]}), file="a.ipynb")
    assert not plan.unsupported
    assert (plan.options["batch_size"], plan.options["seq_len"]) == (4, 256 + completion)
    result = estimate(config=plan)
    assert (result.peaks is not None) is peak
