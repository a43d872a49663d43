"""transformers' Trainer with `device_map="auto"` on two cards: LoRA on Llama-3.2-3B, 1 x 1,024 tokens."""
# gpu: 2xl4
# estimate: llama-3.2-3b --trainer transformers --method lora --r 16 --target-modules all-linear --strategy device-map
# estimate: --no-gradient-checkpointing --batch-size 1 --seq-len 1024

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-3B", dtype="bfloat16", device_map="balanced")
assert len(set(model.hf_device_map.values())) == 2
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
tokens = [list(range(1000, 2024))] * 64
trainer = Trainer(
    model=model,
    args=TrainingArguments(output_dir="out", per_device_train_batch_size=1, bf16=True, max_steps=20, report_to="none"),
    train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
)
trainer.train()
