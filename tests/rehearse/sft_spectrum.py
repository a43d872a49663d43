"""SFTTrainer on a model of which only the parameters that Spectrum's file names train."""

import json
import re
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

folder, output, patterns, length, liger = sys.argv[1:6]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_cache=False)
for name, parameter in model.named_parameters():
    parameter.requires_grad = any(re.match(pattern, name) for pattern in json.loads(patterns))
rows = Dataset.from_list([{"input_ids": list(range(5, 5 + int(length)))}] * 64)
args = SFTConfig(
    output_dir=output,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_length=int(length),
    gradient_checkpointing_kwargs={"use_reentrant": False},
    bf16=True,
    use_liger_kernel=liger == "True",
    report_to="none",
    save_strategy="no",
    max_steps=4,
    dataset_kwargs={"skip_prepare_dataset": True},
    remove_unused_columns=False,
)
SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(folder)).train()
