"""ms-swift's trainers of preferences."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .job import ROWS, arguments, deepspeed

PAIRED = ("dpo", "orpo", "cpo", "reward")
"""Trainers of chosen and rejected completions."""
OTHERS = 7
"""Texts of a list that do not answer its query, where the environment states no fewer."""
OF_TEMPLATE = 148
"""Tokens of Qwen's chat template around a prompt, a token for each byte."""


def with_swift(job: argparse.Namespace) -> None:
    """ms-swift's trainers of preferences, by its own command line, and GRPO on completions that were written elsewhere."""
    from swift import rlhf_main

    _, name, *packed = job.trainer.split("-")
    length = job.seq_len // 2 if packed else job.seq_len  # of a pair, whose row is both
    completion = job.max_completion_length or length - OF_TEMPLATE - 1
    prompt = {"role": "user", "content": "a" * (length - completion - OF_TEMPLATE)}
    answer = {"role": "assistant", "content": "g" * length}  # cut where the row is full
    row: dict[str, Any] = {"messages": [prompt] if name == "grpo" else [prompt, answer]}
    rows = [row | {"rejected_response": "p" * length}] * ROWS if name in PAIRED else [row] * ROWS
    if name == "kto":  # other completions of a batch are scored, which have to be others
        answers = ({"role": "assistant", "content": letter * length} for letter in "ghijklmn" * (ROWS // 8))
        rows = [{"messages": [prompt, answer], "label": number % 2 == 0} for number, answer in enumerate(answers)]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "rlhf_type": {"reward": "rm"}.get(name, name),
        "model": job.model,
        "use_hf": True,
        "tuner_type": "full" if job.method == "full" else "lora",
        "lora_rank": job.r,
        "dataset": "rows.jsonl",
        "split_dataset_ratio": 0,
        "torch_dtype": "bfloat16",
        **{key: value for key, value in arguments(job, None).items() if key not in ("bf16", "fp16", "fsdp", "deepspeed")},
    }
    settings |= {key: value for key in ("beta", "loss_type") if (value := getattr(job, key)) is not None}
    if job.method == "qlora":
        settings |= {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    if (job.strategy or "").startswith("zero"):
        settings["deepspeed"] = json.dumps(deepspeed(job, int(job.strategy[-1])))
    if name == "grpo":
        written_elsewhere(completion)
        if job.use_vllm and job.vllm_mode == "server":
            sent_elsewhere()
        settings |= {"reward_funcs": "format", "num_generations": job.num_generations, "max_completion_length": completion}
    else:
        settings |= {"max_length": length, "truncation_strategy": "right"}
    if packed or job.attn_implementation == "flash_attention_2":
        flash_attention()
        settings["attn_impl"] = "flash_attn"
    if packed:
        known_lengths(length)
        settings |= {"padding_free": True, "loss_scale": "all", "use_logits_to_keep": False}
    rlhf_main([word for key, value in settings.items() for word in (f"--{key}", str(value))])


def flash_attention() -> None:
    """flash-attn's kernels without values, which do not run on the card: the package itself has to be there."""
    from transformers import modeling_flash_attention_utils as utils

    from peftplan.trace.cuda import flash

    kernels = (flash.flash_attn_func, flash.flash_attn_varlen_func, None, flash.pad_input, flash.unpad_input)
    utils._lazy_imports = lambda *_args, **_kwargs: kernels
    _ring_kernels()


def _ring_kernels() -> None:
    """Those kernels as the parts of a ring call them: gradients go into given buffers (flash-attn 2.8.3)."""
    import torch
    from flash_attn import flash_attn_interface as interface

    from peftplan.trace.cuda.flash import QUERY_BLOCK, backward_buffers, expanded_gradients

    def forward(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
        softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
        alibi_slopes: Any = None, return_softmax: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)

    def backward(
        dout: Any, q: Any, k: Any, v: Any, out: Any, softmax_lse: Any, dq: Any, dk: Any, dv: Any, cu_seqlens_q: Any,
        cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Any = None,
        deterministic: bool = False, rng_state: Any = None,
    ) -> Any:  # fmt: skip
        rows = q.shape[0] + QUERY_BLOCK * (cu_seqlens_q.shape[0] - 1)
        delta, queries = backward_buffers(q, rows=(rows,), lse=(q.shape[1], rows))
        of_keys = expanded_gradients(q, k)
        del queries, of_keys
        return delta

    interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward = forward, backward


def known_lengths(length: int) -> None:
    """Where the two completions of a row begin and end: the card cannot say it, as it counts nothing."""
    import torch
    from swift.trainers import SwiftMixin

    SwiftMixin.get_cu_seqlens = lambda *_: torch.tensor([0, length, 2 * length], dtype=torch.int32).cuda()


def known_texts(length: int) -> None:
    """Where the texts of a row begin and end, that every second one is of a new pair, and which answers the query of a list."""
    import torch
    from swift.loss import embedding, reranker
    from swift.trainers import mixin

    revert, parse = mixin.revert_padding_free, embedding._parse_multi_negative_sentences
    listwise = reranker.ListwiseRerankerLoss.__call__

    def reverted(outputs: Any, inputs: Any, *args: Any) -> Any:
        rows = outputs["last_hidden_state" if "last_hidden_state" in outputs else "logits"].shape[1] // length
        return revert(outputs, {"position_ids": torch.arange(length, device="cpu").repeat(1, rows)}, *args)

    mixin.revert_padding_free = reverted
    embedding._parse_multi_negative_sentences = lambda texts, labels, *args: parse(
        texts, torch.ones(len(labels), device="cpu"), *args
    )

    def scored(loss: Any, outputs: Any, labels: Any, **kwargs: Any) -> Any:
        listed = 1 + int(os.environ.get("MAX_NEGATIVE_SAMPLES", OTHERS))
        return listwise(loss, outputs, (torch.arange(len(labels), device="cpu") % listed == 0).long(), **kwargs)

    reranker.ListwiseRerankerLoss.__call__ = scored


def numbers_by_kernel() -> None:
    """The weight of GKD's divergence is filled in on the card: a copy of it would come back where a kernel counts."""
    import torch

    tensor = torch.tensor

    def filled(data: Any, **settings: Any) -> Any:
        fills = isinstance(data, float) and settings.get("device") is not None
        return torch.full((), data, **settings) if fills else tensor(data, **settings)

    torch.tensor = filled


class Server:
    """A server of vLLM, which does not run here: it takes what it is sent."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_kwargs: None


class Engine:
    """An engine of vLLM beside the trainer, which does not run here either."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Engine()

    def __call__(self, *_: object, **__: object) -> None:
        return None


def sent_elsewhere(mode: str = "server", sleep_level: int = 0) -> None:
    """The weights go to a server, or an engine beside the trainer, before it generates. `sleep_level`: of the engine, which the
    tool's arguments set to 0 without vLLM."""
    from swift.rlhf_trainers import rollout_mixin

    mixin = rollout_mixin.RolloutTrainerMixin
    prepare = mixin._prepare_vllm

    def prepared(trainer: Any) -> None:
        prepare(trainer)
        trainer.use_fast_infer = True
        trainer.vllm_mode = trainer.args.vllm_mode = mode
        trainer.args.sleep_level = sleep_level
        trainer.vllm_client, trainer.engine = Server(), Engine()
        trainer.rollout_enable_lora = mode == "colocate" and trainer.args.vllm_enable_lora
        trainer.enable_offload = mode == "colocate" and (trainer.args.offload_model or trainer.args.offload_optimizer)
        with trainer.offload_context() if trainer.enable_offload else nullcontext():  # where the engine starts
            pass

    mixin._prepare_vllm = prepared
    if mode == "colocate":
        mixin._get_vllm_param_names_for_mapping = lambda _: set()
        for name in ("finish_vllm_weight_reload", "patch_vllm_moe_model_weight_loader", "TensorLoRARequest"):
            setattr(rollout_mixin, name, Engine())
        rollout_mixin.vllm_supports_lora_load_inplace = lambda: False


def written_elsewhere(tokens: int) -> None:
    """Completions as a server of vLLM answers them."""
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
