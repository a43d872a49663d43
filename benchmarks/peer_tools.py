"""Other estimators behind one function each: a job in plain words → bytes of the peak, or a refusal.

A job says: `model` (name), `folder` (with its config.json), `config`, `task`, `method` (full | lora), `quant` (none | nf4),
`double_quant`, `r`, `alpha`, `dropout`, `targets`, `dtype`, `autocast`, `optim`, `batch`, `seq`, `accumulation`, `checkpointing`,
`attention`, `gpu`, `gpu_gib`. What a tool cannot be told (autocast, whether outputs are kept, …) is left to it; a method, a
storage, targets or an optimizer that it has no word for is a refusal. Each function returns `allocated`, `reserved` and `device`:
its sum without what it adds for context and fragmentation, and with that, as the tool itself names the parts. Only the tool is
imported, inside its function.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

Job = Mapping[str, Any]
GIB, MIB, MB = 2**30, 2**20, 10**6
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ADAMW = ("adamw_torch", "adamw_torch_fused")
ADAMW_8BIT = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit")


class Refused(Exception):
    """The tool has no word for a part of the job, or says no itself."""


def need(fine: bool, why: str) -> None:
    if not fine:
        raise Refused(why)


def answer(allocated: float, total: float) -> dict[str, int]:
    return {"allocated": int(allocated), "reserved": int(total), "device": int(total)}


def word(words: Mapping[str, str], value: str, what: str) -> str:
    need(value in words, f"no word for {what} {value}")
    return words[value]


def optimizer(job: Job, *, plain: str, eight_bit: str | None = None) -> str:
    word = plain if job["optim"] in ADAMW else eight_bit if job["optim"] in ADAMW_8BIT else None
    need(word is not None, f"no word for optimizer {job['optim']}")
    return str(word)


def fitcheck(job: Job) -> dict[str, int]:
    from fitcheck import TrainingConfig, config_parser, estimate, get_gpu

    keys = {"t4": "t4", "a100-80gb": "a100-80", "l40s": "l40s", "v100-16gb": "v100-16", "a100-40gb": "a100-40"}
    need(job["task"] == "CAUSAL_LM", "causal language models only")
    with (
        patch.object(config_parser, "hf_hub_download", lambda **_: str(Path(job["folder"]) / "config.json")),
        patch.object(config_parser, "_reported_param_count", lambda *_: None),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        model = config_parser.fetch_model_config(job["model"])
    training = TrainingConfig(
        precision=job["dtype"],
        quantization=job["quant"],
        double_quant=job["double_quant"],
        optimizer=optimizer(job, plain="adamw", eight_bit="adam8bit"),
        batch_size=job["batch"],
        seq_len=job["seq"],
        lora_rank=job["r"] if job["method"] == "lora" else None,
        lora_targets=job["targets"] or ATTENTION,
        grad_checkpoint=job["checkpointing"],
        flash_attn=job["attention"] != "eager",
        grad_accum_steps=job["accumulation"],
    )
    gpu = get_gpu(keys[job["gpu"]]) if job["gpu"] in keys else get_gpu(vram_mib=int((job["gpu_gib"] or 80) * 1024))
    report = estimate(model, training, gpu)
    return answer((report.total_mib - report.overhead_mib) * MIB, report.total_mib * MIB)


def vramcalc(job: Job) -> dict[str, int]:
    import vramcalc as tool

    need(job["quant"] == "none", "no quantized training")
    need(job["method"] == "full" or job["targets"] == ATTENTION, "LoRA on q, k, v and o only")
    mixed = job["dtype"] == "fp32" and job["autocast"] != "none"
    result = tool.estimate(
        job["config"],
        mode="train",
        dtype=job["autocast"] if mixed else job["dtype"],
        batch=job["batch"],
        seq_len=job["seq"],
        lora_rank=job["r"] if job["method"] == "lora" else None,
        grad_checkpoint=job["checkpointing"],
        optimizer=optimizer(job, plain="adamw"),
        precision="amp" if mixed else "pure",
        attn_impl=word({"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash"}, job["attention"], "attention"),
    )
    return answer(result.total, result.total + result.overhead)


def canifinetune(job: Job) -> dict[str, int]:
    from canifinetune.estimator.memory import EstimateRequest, estimate

    need(job["gpu_gib"] is not None, "it asks for the card, which the row does not name beyond doubt")
    need(job["optim"] in (*ADAMW, *ADAMW_8BIT), f"no word for optimizer {job['optim']}")
    quantized = job["quant"] != "none"
    words = {("nf4", True): "nf4_double_quant", ("nf4", False): "nf4", ("none", False): "none"}
    result = estimate(
        EstimateRequest(
            model_id=job["folder"],
            method="qlora" if quantized else job["method"],
            seq_len=job["seq"],
            micro_batch_size=job["batch"],
            gradient_accumulation_steps=job["accumulation"],
            base_dtype=job["dtype"],
            quantization=words[job["quant"], job["double_quant"]],
            lora_rank=job["r"] or 16,
            lora_alpha=job["alpha"] or 32,
            lora_dropout=job["dropout"] or 0.0,
            target_modules=job["targets"],
            optimizer="adamw_8bit" if job["optim"] == "adamw_bnb_8bit" else job["optim"],
            gradient_checkpointing=job["checkpointing"],
            attention_implementation=job["attention"],
            local_files_only=True,
            use_network=False,
            gpu_vram_gb=job["gpu_gib"],
        )
    ).memory
    total = result.total_estimated_gb - result.safety_margin_gb
    return answer((total - result.cuda_overhead_gb) * GIB, total * GIB)


def fitscout(job: Job) -> dict[str, int]:
    from fitscout.memory.estimator import estimate_memory
    from fitscout.model.introspect import inspect_model

    need(job["task"] == "CAUSAL_LM", "causal language models only")
    need(job["method"] == "full" or set(job["targets"]) == {"q_proj", "v_proj"}, "LoRA on q and v only")
    result = estimate_memory(
        inspect_model(job["folder"], dtype_bytes=4 if job["dtype"] == "fp32" else 2),
        method="qlora" if job["quant"] != "none" else job["method"],
        micro_batch=job["batch"],
        seq_len=job["seq"],
        grad_ckpt=job["checkpointing"],
        opt_8bit=optimizer(job, plain="32", eight_bit="8") == "8",
        lora_rank=job["r"] or 16,
    )
    return answer((result.total_gb - result.overhead_gb) * GIB, result.total_gb * GIB)


def ftuneai(job: Job) -> dict[str, int]:
    from ftuneai import hub
    from ftuneai.estimator import Estimator

    targets = {(): "attention", ("q_proj", "v_proj"): "attention", tuple(ATTENTION): "attention_all"}
    targets[tuple(ATTENTION + MLP)] = "all_linear"
    need(tuple(job["targets"] or ()) in targets, "no word for these LoRA targets")
    need(job["task"] == "CAUSAL_LM", "causal language models only")
    with patch.object(hub, "fetch_model_config", lambda name: dict(job["config"])):
        estimator = Estimator(
            model=job["model"],
            method="qlora" if job["quant"] != "none" else job["method"],
            quantization="4bit" if job["quant"] != "none" else "none",
            batch_size=job["batch"],
            seq_length=job["seq"],
            gradient_checkpointing=job["checkpointing"],
            optimizer=optimizer(job, plain="adamw", eight_bit="adam_8bit"),
            lora_rank=job["r"] or 16,
            lora_target=targets[tuple(job["targets"] or ())],
            flash_attention=job["attention"] == "flash_attention_2",
        ).estimate_memory()
    return answer((estimator.total_gb - estimator.overhead_gb) * GIB, estimator.total_gb * GIB)


def qmemcalc(job: Job) -> dict[str, int]:
    from qmemcalc.memory import estimate_memory

    need(job["method"] == "lora", "full fine-tuning has no word of its own")
    result = estimate_memory(
        job["folder"],
        job["batch"],
        job["seq"],
        lora_r=job["r"],
        precision=job["dtype"],
        quantization="4bit" if job["quant"] != "none" else "none",
        optimizer=optimizer(job, plain="adamw"),
        gradient_checkpointing=job["checkpointing"],
    )
    return answer((result["total_MB"] - result["buffers_MB"]) * MB, result["total_MB"] * MB)


TOOLS: dict[str, Callable[[Job], dict[str, int]]] = {
    "fitcheck-llm": fitcheck,
    "vramcalc": vramcalc,
    "canifinetune": canifinetune,
    "fitscout": fitscout,
    "ftuneai": ftuneai,
    "qmemcalc": qmemcalc,
}
"""Distribution on PyPI → its function."""
