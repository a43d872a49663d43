"""transformers' Trainer under DeepSpeed ZeRO-1 by accelerate's launcher: full fine-tuning of Qwen2.5-0.5B, as rank 0 of 4."""
# gpu: 4xrtx-4090
# launcher: accelerate launch --num_processes 4 --use_deepspeed --zero_stage 1 --mixed_precision bf16
# needs: deepspeed
# estimate: qwen2.5-0.5b --trainer transformers --method full --no-gradient-checkpointing --batch-size 2 --seq-len 512
# estimate: --strategy zero1

from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

rows = Dataset.from_dict({"input_ids": [list(range(1000, 1512))] * 64, "labels": [list(range(1000, 1512))] * 64})
trainer_arguments = TrainingArguments(
    output_dir="out",
    per_device_train_batch_size=2,
    max_steps=20,
    bf16=True,
    report_to="none",
)
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype="bfloat16")
trainer = Trainer(model=model, args=trainer_arguments, train_dataset=rows)
trainer.train()
