"""TRL's trainers whose completions a reward model scores, as their scripts run them: all models are loaded on the host, in one
dtype. Those beside OnlineDPOTrainer are in trl before 1.16."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .job import DTYPES, adapter, arguments, load, without_kernels
from .preferences import texts

CALLED = {"trl-online-dpo": "OnlineDPO", "trl-xpo": "XPO", "trl-nash-md": "NashMD", "trl-ppo": "PPO"}
"""Trainer → the name of its classes."""


def with_rewards(job: argparse.Namespace) -> None:
    """OnlineDPOTrainer, XPOTrainer and NashMDTrainer."""
    config_class, trainer_class = _classes(job)
    settings = {"max_length": job.seq_len, "max_new_tokens": job.max_completion_length or 64}
    training = config_class(**settings, **arguments(job, None))  # first: under ZeRO-3 it decides how models are loaded
    model, reward, tokenizers = load(job), _scoring(job), _tokenizers(job)
    others: dict[str, Any] = {"reward_processing_classes": tokenizers[1]} if job.trainer != "trl-nash-md" else {}
    if job.trainer != "trl-online-dpo":
        others["ref_model"] = load(job)
        for each in (model, others["ref_model"]):  # loaded with `use_cache=False` where layers are recomputed
            each.config.use_cache = each.generation_config.use_cache = False
    trainer_class(
        model=model,
        reward_funcs=reward,
        args=training,
        train_dataset=texts(job, "grpo", tokenizers[0]),
        processing_class=tokenizers[0],
        peft_config=adapter(job),
        **others,
    ).train()


def with_values(job: argparse.Namespace) -> None:
    """PPOTrainer, whose value model is trained too."""
    config_class, trainer_class = _classes(job)
    sys.modules[trainer_class.__module__].masked_var = _spread  # type: ignore[attr-defined]
    settings = {
        "num_ppo_epochs": 1,
        "response_length": job.max_completion_length or 53,
        "local_rollout_forward_batch_size": job.rollout_batch_size or 64,
        "total_episodes": 10_000,
    }
    tokenizer = _tokenizers(job)[0]
    tokenizer.padding_side = "left"
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    launched = _launched(job) if (job.strategy or "").startswith("zero") else {}
    os.environ |= launched
    of_trainer = arguments(job, None)
    if launched:
        del of_trainer["deepspeed"]
    training = config_class(**settings, **of_trainer)
    value, reward, policy = _scoring(job), _scoring(job), load(job)
    peft = adapter(job)
    dataset = texts(job, "grpo", tokenizer).map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]})
    dataset = dataset.remove_columns("prompt")
    print("prompt", len(dataset[0]["input_ids"]), flush=True)
    trainer_class(
        args=training,
        processing_class=tokenizer,
        model=policy,
        ref_model=load(job) if peft is None else None,
        reward_model=reward,
        value_model=value,
        train_dataset=dataset,
        eval_dataset=dataset,
        peft_config=peft,
    ).train()


def _spread(values: torch.Tensor, mask: torch.Tensor, **_: object) -> torch.Tensor:
    """The variance of what counts. The emulated card cannot say that something does."""
    return ((values - (values * mask).sum()) ** 2 * mask).sum()


def _launched(job: argparse.Namespace) -> dict[str, str]:
    """What `accelerate launch` sets of the config files for DeepSpeed that trl has: PPOTrainer makes an Accelerator of its own,
    which reads nothing else."""
    without_kernels()
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_MIXED_PRECISION": job.autocast or "bf16",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(job.strategy)[-1],
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(job.strategy == "zero3").lower(),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    }


def _classes(job: argparse.Namespace) -> tuple[Any, Any]:
    module = importlib.import_module(f"trl.experimental.{job.trainer.removeprefix('trl-').replace('-', '_')}")
    return getattr(module, f"{CALLED[job.trainer]}Config"), getattr(module, f"{CALLED[job.trainer]}Trainer")


def _scoring(job: argparse.Namespace) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(job.reward_model, num_labels=1, dtype=DTYPES[job.dtype])


def _tokenizers(job: argparse.Namespace) -> list[Any]:
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (job.model, job.reward_model)]
    for tokenizer in tokenizers:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizers
