"""Small files of each tool, and how tests read them."""

from __future__ import annotations

from typing import Any

from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_values

AXOLOTL = {
    "base_model": "meta-llama/Llama-3.1-8B",
    "adapter": "qlora",
    "load_in_4bit": True,
    "sequence_len": 4096,
    "lora_r": 32,
    "lora_target_linear": True,
    "micro_batch_size": 2,
    "optimizer": "paged_adamw_8bit",
    "bf16": "auto",
    "gradient_checkpointing": True,
    "attn_implementation": "flash_attention_2",
    "lora_mlp_kernel": False,
}
LLAMAFACTORY_V1 = {
    "model": "Qwen/Qwen3-0.6B",
    "model_class": "llm",
    "kernel_config": {"name": "auto"},
    "dist_config": {"name": "fsdp2", "dcp_path": None},
    "train_dataset": "data/v1_sft_demo.yaml",
    "micro_batch_size": 2,
    "cutoff_len": 2048,
}
LLAMAFACTORY = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_target": "all",
    "cutoff_len": 1024,
    "per_device_train_batch_size": 1,
    "bf16": True,
}
TRL = {"model_name_or_path": "Qwen/Qwen2.5-0.5B", "use_peft": True, "load_in_4bit": True}
TORCHTUNE = {
    "model": {
        "_component_": "torchtune.models.llama3_1.lora_llama3_1_8b",
        "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": False,
    },
    "checkpointer": {"checkpoint_dir": "/data/Meta-Llama-3.1-8B-Instruct/"},
    "tokenizer": {"max_seq_len": None},
    "dtype": "bf16",
    "batch_size": 2,
    "optimizer": {"_component_": "torch.optim.AdamW", "fused": True},
    "enable_activation_checkpointing": True,
}
SWIFT = {"model": "Qwen/Qwen2.5-7B-Instruct", "tuner_type": "lora", "torch_dtype": "bfloat16", "max_length": 2048}


def read(values: dict[str, Any], **more: Any) -> ConfigPlan:
    return read_values(values, file="run.yml", **more)
