"""ms-swift's trainers of preferences."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .job import ROWS, arguments, deepspeed

OF_TEMPLATE = 148
"""Tokens of Qwen's chat template around a prompt, a token for each byte."""


def with_swift(job: argparse.Namespace) -> None:
    """ms-swift's trainers of preferences, by its own command line, and GRPO on completions that were written elsewhere."""
    from swift import rlhf_main

    completion = job.max_completion_length or job.seq_len - OF_TEMPLATE - 1
    name = job.trainer.partition("-")[2]
    prompt = {"role": "user", "content": "a" * (job.seq_len - completion - OF_TEMPLATE)}
    answer = {"role": "assistant", "content": "g" * job.seq_len}  # cut where the row is full
    row = {"messages": [prompt]} if name == "grpo" else {"messages": [prompt, answer], "rejected_response": "p" * job.seq_len}
    Path("rows.jsonl").write_text(f"{json.dumps(row)}\n" * ROWS, encoding="utf-8")
    settings: dict[str, Any] = {
        "rlhf_type": name,
        "model": job.model,
        "use_hf": True,
        "tuner_type": "full" if job.method == "full" else "lora",
        "lora_rank": job.r,
        "dataset": "rows.jsonl",
        "split_dataset_ratio": 0,
        "torch_dtype": "bfloat16",
        **{key: value for key, value in arguments(job, None).items() if key not in ("bf16", "fp16", "fsdp", "deepspeed")},
    }
    if job.method == "qlora":
        settings |= {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    if (job.strategy or "").startswith("zero"):
        settings["deepspeed"] = json.dumps(deepspeed(job, int(job.strategy[-1])))
    if name == "grpo":
        written_elsewhere(completion)
        settings |= {"reward_funcs": "format", "num_generations": job.num_generations, "max_completion_length": completion}
    else:
        settings |= {"max_length": job.seq_len, "truncation_strategy": "right"}
    rlhf_main([word for key, value in settings.items() for word in (f"--{key}", str(value))])


def written_elsewhere(tokens: int) -> None:
    """Completions as a server of vLLM answers them, which does not run here."""
    from swift.infer_engine.protocol import (
        ChatCompletionResponse,
        ChatCompletionResponseChoice,
        ChatMessage,
        RolloutOutput,
        UsageInfo,
    )
    from swift.rlhf_trainers.rollout_mixin import RolloutTrainerMixin

    def answers(trainer: Any, samples: list[Any], *_: object) -> list[Any]:
        message = ChatMessage(role="assistant", content="good")
        choice = ChatCompletionResponseChoice(index=0, message=message, finish_reason="length", token_ids=[5] * tokens)
        response = ChatCompletionResponse(model="", choices=[choice], usage=UsageInfo(1, tokens, tokens + 1))
        return [RolloutOutput(response=response) for _ in samples]

    RolloutTrainerMixin._rollout = answers
