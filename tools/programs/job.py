"""What the programs have in common: the options, the model, the adapter, the arguments, the rows."""

from __future__ import annotations

import argparse
import json
import os
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AwqConfig,
    BitsAndBytesConfig,
    GPTQConfig,
)

from .without_peft import WITHOUT_PEFT

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = 256
STEPS = 20
FLAGS = argparse.BooleanOptionalAction
CLASSIFIERS = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
AUTOMATIC_SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""What transformers and accelerate compute of the model's hidden size."""
OF_FSDP = ("use_orig_params", "reshard_after_forward", "forward_prefetch", "cpu_ram_efficient_loading")
PER_SAMPLE = ("ForSequenceClassification", "ForImageClassification")
"""Ends of names of classes that want one label per sample."""
OTHER_TRAINERS = (
    "trl-dpo",
    "trl-kto",
    "trl-reward",
    "trl-orpo",
    "trl-cpo",
    "trl-tpo",
    "trl-grpo",
    "trl-rloo",
    "trl-ssd",
    "trl-gkd",
    "trl-gold",
    "trl-distillation",
    "trl-online-dpo",
    "trl-xpo",
    "trl-nash-md",
    "trl-ppo",
)
LLAMA_FACTORY = ("llamafactory-dpo", "llamafactory-kto")
SWIFT = ("swift-dpo", "swift-dpo-packed", "swift-kto", "swift-reward", "swift-orpo", "swift-cpo", "swift-grpo")
AXOLOTL = ("axolotl-dpo", "axolotl-kto", "axolotl-orpo", "axolotl-cpo", "axolotl-reward")
V1 = "llamafactory-v1"
TRAINERS = ("transformers", "trl", "trl-packed", "plain", *OTHER_TRAINERS, *AXOLOTL, *LLAMA_FACTORY, *SWIFT, V1)


def options() -> argparse.Namespace:
    """The options that a job may have, under the names of `peftplan estimate`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--task-type", choices=tuple(CLASSIFIERS))
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--num-virtual-tokens", type=int)
    parser.add_argument("--trainable-layers", type=int, default=2)
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument("--target-modules", default="all-linear")
    parser.add_argument("--quant", choices=("nf4", "int8", "gptq", "awq"))
    parser.add_argument("--quant-bits", type=int, default=4)
    parser.add_argument("--quant-group-size", type=int, default=128)
    parser.add_argument("--double-quant", action=FLAGS)
    parser.add_argument("--compute-dtype", choices=tuple(DTYPES))
    parser.add_argument("--quant-storage", default="uint8", choices=("uint8", *DTYPES))
    parser.add_argument("--kbit-prepare", action=FLAGS, default=True)
    parser.add_argument("--bias", choices=("none", "all", "lora_only"), default="none")
    parser.add_argument("--use-dora", action=FLAGS, default=False)
    parser.add_argument("--use-rslora", action=FLAGS, default=False)
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--device-map", choices=("none", "auto", "cuda"))
    parser.add_argument("--autocast", choices=("none", "bf16", "fp16"))
    parser.add_argument("--trainer", default="transformers", choices=TRAINERS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--eval-batch-size", type=int)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action=FLAGS)
    parser.add_argument("--use-reentrant", action=FLAGS)
    parser.add_argument("--optim")
    parser.add_argument("--optim-target-modules")
    parser.add_argument("--attn-implementation")
    parser.add_argument("--loss", choices=("full", "per-token", "eaft", "cut-cross-entropy", "liger"), default="full")
    parser.add_argument("--kernels", choices=("axolotl", "liger", "trl-offload", "liger,trl-offload", "mamba-ssm", "fla"))
    parser.add_argument("--max-completion-length", type=int)
    parser.add_argument("--teacher-model")
    parser.add_argument("--reward-model")
    parser.add_argument("--precompute-ref-log-probs", action=FLAGS, default=False)
    parser.add_argument("--beta", type=float)
    parser.add_argument("--loss-type")
    parser.add_argument("--num-generations", type=int)
    parser.add_argument("--steps-per-generation", type=int)
    parser.add_argument("--tool-turns", action=FLAGS, default=False)
    parser.add_argument("--rollout-batch-size", type=int)
    parser.add_argument("--use-vllm", action=FLAGS, default=False)
    parser.add_argument("--vllm-mode", choices=("server", "colocate"))
    parser.add_argument("--padding", action=FLAGS, default=False)
    parser.add_argument("--strategy", choices=("ddp", "fsdp1", "fsdp2", "zero0", "zero1", "zero2", "zero3"))
    parser.add_argument("--overlap-comm", action=FLAGS, default=True)
    for name in AUTOMATIC_SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", choices=("auto",))
    parser.add_argument("--zero3-init", action=FLAGS)
    parser.add_argument("--reshard-after-forward", type=json.loads, choices=(True, False))
    for name in ("use-orig-params", "forward-prefetch", "sync-each-batch", "cpu-ram-efficient-loading", "find-unused-parameters"):
        parser.add_argument(f"--{name}", action=FLAGS)
    parser.add_argument("--transformer-cls-names-to-wrap")
    parser.add_argument("--dp-shard-size", type=int)
    parser.add_argument("--offload-params", choices=("none", "cpu"), default="none")
    parser.add_argument("--offload-optimizer", choices=("none", "cpu"), default="none")
    parser.add_argument("--deepspeed-optimizer", action=FLAGS, default=False)
    parser.add_argument("--zero-force-ds-cpu-optimizer", action=FLAGS, default=False)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--local_rank", type=int)
    return parser.parse_args()


def checkpoints(job: argparse.Namespace) -> bool:
    """Whether layers are recomputed: both trainers do so unless told otherwise."""
    return job.trainer != "plain" if job.gradient_checkpointing is None else job.gradient_checkpointing


def class_of(job: argparse.Namespace, config: Any) -> Any:
    """The class that a task wants, else the one that the model's config names."""
    return CLASSIFIERS[job.task_type] if job.task_type else getattr(transformers, config.architectures[0])


def is_in_4_bits(job: argparse.Namespace) -> bool:
    """Whether the base is in nf4."""
    return job.method in ("qlora", "qdora") or job.quant == "nf4"


def load(job: argparse.Namespace, auto_class: Any = AutoModelForCausalLM) -> Any:
    """The model, as it is passed to a trainer."""
    quantization = None
    if is_in_4_bits(job):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=job.quant != "nf4" if job.double_quant is None else job.double_quant,
            bnb_4bit_compute_dtype=DTYPES[job.compute_dtype or job.dtype],
            bnb_4bit_quant_storage=DTYPES.get(job.quant_storage, torch.uint8),
        )
    if job.quant == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    name = job.model
    if job.quant in ("gptq", "awq"):
        name, quantization = packed(job)
    attention = {"attn_implementation": job.attn_implementation} if job.attn_implementation else {}
    if job.trainer.endswith("-reward"):
        attention["num_labels"] = 1
    device_map = job.device_map or ("auto" if job.trainer in AXOLOTL else "none")
    if device_map != "none":
        attention["device_map"] = device_map
    return auto_class.from_pretrained(name, dtype=DTYPES[job.dtype], quantization_config=quantization, **attention)


def packed(job: argparse.Namespace) -> tuple[str, Any]:
    """A folder with the model's config as a repository of packed weights has it, and which kernels to load them for.

    No kernels are compiled for the machine, as without nvcc: most do not train, and are rejected after that.
    """
    from gptqmodel.utils.cpp import TorchOpsJitExtension

    TorchOpsJitExtension.load = lambda self: False
    config = AutoConfig.from_pretrained(job.model)
    common = {"quant_method": job.quant, "bits": job.quant_bits, "group_size": job.quant_group_size}
    of_gptq = {"desc_act": False, "sym": True}
    config.quantization_config = {**common, **(of_gptq if job.quant == "gptq" else {"zero_point": True, "version": "gemm"})}
    config.save_pretrained("packed")
    backend = {"backend": "auto_trainable"}
    return "packed", GPTQConfig(bits=job.quant_bits, **backend) if job.quant == "gptq" else AwqConfig(**backend)


def adapter(job: argparse.Namespace) -> Any:
    """peft's config of the method, None for full fine-tuning."""
    if job.method in ("full", *WITHOUT_PEFT):
        return None
    if job.method not in ("lora", "qlora", "rslora", "dora", "qdora", "lora+", "lora-fa"):
        steps = {"total_step": STEPS} if job.method == "adalora" else {}
        virtual = {} if job.num_virtual_tokens is None else {"num_virtual_tokens": job.num_virtual_tokens}
        named = {} if job.target_modules == "all-linear" else {"target_modules": job.target_modules.split(",")}
        kind = PeftType(job.method.upper().replace("-", "_"))
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type=task_of(job), **steps, **virtual, **named)
    named = job.target_modules != "all-linear" and "*" not in job.target_modules
    modules = job.target_modules.split(",") if named else job.target_modules
    with_dora = job.use_dora or job.method in ("dora", "qdora")
    others = {"lora_dropout": job.lora_dropout, "use_dora": with_dora, "use_rslora": job.use_rslora, "bias": job.bias}
    return LoraConfig(r=job.r, target_modules=modules, task_type=task_of(job), **others)


def _loraplus(job: argparse.Namespace, model: Any) -> Any:
    fused = {} if job.optim == "adamw_torch" else {"fused": True}  # with False, torch steps over one tensor after another
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16, **fused)


def _lorafa(job: argparse.Namespace, model: Any) -> Any:
    return create_lorafa_optimizer(model, r=job.r, lora_alpha=8, lr=1e-4)


OPTIMIZERS = {"lora+": _loraplus, "lora-fa": _lorafa}
"""Methods that bring an optimizer along, and what makes it."""


def task_of(job: argparse.Namespace) -> str | None:
    """peft's task: that of the job, else the one that the model's class has."""
    config = AutoConfig.from_pretrained(job.model)
    if job.trainer.endswith("-reward"):
        return "SEQ_CLS"
    if config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return job.task_type or ("CAUSAL_LM" if config.architectures[0].endswith(("ForCausalLM", "LMHeadModel")) else None)


def sharding(job: argparse.Namespace, model: Any) -> dict[str, Any]:
    """TrainingArguments' fields for several GPUs."""
    strategy = job.strategy or "ddp"
    if strategy.startswith("fsdp"):
        if named := job.transformer_cls_names_to_wrap:
            os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = named  # as `accelerate launch` does, and peft reads it
        layers = {"transformer_layer_cls_to_wrap": named.split(",") if named else list(model._no_split_modules)}
        offload = " offload" if job.offload_params == "cpu" else ""
        stated = {name: value for name in OF_FSDP if (value := getattr(job, name)) is not None}
        config = {"version": int(strategy[-1]), **layers, **stated}
        return {"fsdp": f"full_shard auto_wrap{offload}", "fsdp_config": config, **groups(job)}
    if strategy.startswith("zero"):
        return {"deepspeed": deepspeed(job, int(strategy[-1]))}
    return {}


def groups(job: argparse.Namespace) -> dict[str, Any]:
    """The groups of ranks that share one copy of the model."""
    if job.dp_shard_size is None:
        return {}
    from accelerate.parallelism_config import ParallelismConfig

    replicas = job.gpus * job.nodes // job.dp_shard_size
    return {"parallelism_config": ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=job.dp_shard_size)}


def without_kernels() -> None:
    """Stand for the compiled parts of DeepSpeed's optimizers, which change values alone."""
    from deepspeed.ops import op_builder

    names = ("multi_tensor_adam", "create_adam", "destroy_adam", "adam_update", "create_lion", "destroy_lion", "lion_update")
    for builder in (op_builder.FusedAdamBuilder, op_builder.CPUAdamBuilder, op_builder.CPULionBuilder):
        builder.load = lambda self, **_: SimpleNamespace(**dict.fromkeys(names, lambda *_: None))


def deepspeed(job: argparse.Namespace, stage: int) -> dict[str, Any]:
    """DeepSpeed's config, with what transformers resolves left to it."""
    without_kernels()
    own = {"optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}}
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": job.overlap_comm}
    if stage == 3:
        zero |= dict.fromkeys(AUTOMATIC_SIZES, "auto")
    for what, place in (("offload_param", job.offload_params), ("offload_optimizer", job.offload_optimizer)):
        if place != "none":
            zero[what] = {"device": place, "pin_memory": True}
    automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping", "gradient_accumulation_steps")
    return {
        **dict.fromkeys(automatic, "auto"),
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": job.zero_force_ds_cpu_optimizer,
        **(own if job.deepspeed_optimizer else {}),
    }


def arguments(job: argparse.Namespace, model: Any) -> dict[str, Any]:
    """TrainingArguments' fields that both trainers take."""
    autocast = job.autocast or "bf16"
    reentrant = {} if job.use_reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": job.use_reentrant}}
    return {
        "output_dir": "out",
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "gradient_checkpointing": checkpoints(job),
        **reentrant,
        "optim": job.optim or "adamw_torch_fused",
        "optim_target_modules": job.optim_target_modules,
        **({"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}} if job.sync_each_batch else {}),
        "ddp_find_unused_parameters": job.find_unused_parameters,
        "bf16": autocast == "bf16",
        "fp16": autocast == "fp16",
        "max_steps": STEPS,
        **evaluation(job),
        "use_liger_kernel": "liger" in (job.loss, *(job.kernels or "").split(",")),
        "report_to": "none",
        **(sharding(job, model) if job.strategy or "WORLD_SIZE" in os.environ else {}),
    }


def evaluation(job: argparse.Namespace) -> dict[str, Any]:
    """TrainingArguments' fields for an evaluation after every second step."""
    rows = job.eval_batch_size
    return {} if rows is None else {"per_device_eval_batch_size": rows, "eval_strategy": "steps", "eval_steps": 2}


def evaluated(job: argparse.Namespace, dataset: Any) -> dict[str, Any]:
    """The rows of an evaluation, as an argument of a trainer: two batches."""
    return {} if job.eval_batch_size is None else {"eval_dataset": dataset.select(range(2 * job.eval_batch_size))}


def rows(job: argparse.Namespace, model: Any) -> Any:
    """Rows of as many tokens as the job says, or of one picture."""
    if hasattr(model.config, "image_size"):
        size, channels = model.config.image_size, model.config.num_channels
        return [{"pixel_values": torch.zeros(channels, size, size), "labels": 0}] * ROWS
    tokens = [(7 * place) % model.config.get_text_config().vocab_size for place in range(job.seq_len)]
    labels = 0 if type(model).__name__.endswith(PER_SAMPLE) else tokens
    return Dataset.from_dict({"input_ids": [tokens] * ROWS, "labels": [labels] * ROWS})
