"""LLaMA-Factory's trainers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoTokenizer

from .job import ROWS, adapter, arguments, checkpoints, deepspeed, evaluated, load, rows


def with_llama_factory(job: argparse.Namespace) -> None:
    """LLaMA-Factory's trainers of pairs and of single completions, with rows of one length."""
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    from llamafactory.train.kto.trainer import CustomKTOTrainer
    from transformers import Seq2SeqTrainingArguments

    model = load(job)
    if (peft := adapter(job)) is not None:
        model = get_peft_model(model, peft)
        if checkpoints(job):
            model.enable_input_require_grads()
    pairs = job.trainer == "llamafactory-dpo"

    def batch(examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = (2 if pairs else 1) * len(examples)
        tokens = torch.tensor([examples[0]["input_ids"]] * rows)
        labels = tokens.masked_fill(
            torch.arange(job.seq_len) < job.seq_len - (job.max_completion_length or job.seq_len - 1), -100
        )
        parts = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
        if pairs:
            return parts
        return {**parts, **{f"kl_{name}": part.clone() for name, part in parts.items()}, "kto_tags": torch.ones(rows).bool()}

    dataset = rows(job, model)
    (CustomDPOTrainer if pairs else CustomKTOTrainer)(
        model=model,
        ref_model=None,
        args=Seq2SeqTrainingArguments(**arguments(job, model), remove_unused_columns=False),
        finetuning_args=FinetuningArguments(stage=job.trainer.partition("-")[2], pref_loss=job.loss_type or "sigmoid"),
        processor=None,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        data_collator=batch,
        train_dataset=dataset,
        **evaluated(job, dataset),
    ).train()


def with_llama_factory_v1(job: argparse.Namespace) -> None:
    """LLaMA-Factory v1's own loop under FSDP2 or DeepSpeed, as its launcher starts it."""
    from llamafactory.v1.trainers.sft_trainer import run_sft

    turns = (("user", "ask"), ("assistant", "good" * job.seq_len))
    messages = [{"role": role, "content": [{"type": "text", "value": text}]} for role, text in turns]
    Path("rows.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * ROWS, encoding="utf-8")
    Path("data.yaml").write_text("rows: {path: rows.jsonl, source: local}\n", encoding="utf-8")
    step = job.gpus * job.batch_size * job.gradient_accumulation_steps
    settings: dict[str, Any] = {}
    sharded = {"name": "fsdp2"}
    if job.strategy != "fsdp2":
        Path("deepspeed.json").write_text(json.dumps(deepspeed(job, int(job.strategy[-1]))), encoding="utf-8")
        sharded = {"name": "deepspeed", "config_file": "deepspeed.json"}
    fields: dict[str, Any] = dict(field.split("=", 1) for field in job.set)
    if job.method == "partial":
        settings["peft_config"] = {"name": "freeze", "freeze_trainable_layers": int(fields["trainable_layers"])}
    elif job.method != "full":
        targets = "all" if job.target_modules == "all-linear" else job.target_modules.split(",")
        fields = {"r": job.r, "lora_dropout": job.lora_dropout, "target_modules": targets}
        settings["peft_config"] = {"name": "lora", **fields}
    if job.method == "qlora":
        settings["quant_config"] = {"name": "bnb", "quantization_bit": 4}
    if job.optim == "moonlight_muon":  # of 0.9.6.dev0
        settings["optim_config"] = {"name": "muon"}
    run_sft(
        {
            **settings,
            "model": job.model,
            "train_dataset": "data.yaml",
            "output_dir": "out",
            "micro_batch_size": job.batch_size,
            "global_batch_size": step,
            "cutoff_len": job.seq_len,
            "max_steps": 20,
            "batching_workers": 0,
            "enable_activation_checkpointing": checkpoints(job),
            "kernel_config": {"name": "auto"},
            "dist_config": sharded,
        }
    )
