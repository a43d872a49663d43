"""The same under ZeRO-2 with its optimizer on the host."""
# gpu: 4xrtx-4090
# launcher: deepspeed --num_gpus 4
# needs: deepspeed
# estimate: qwen2.5-0.5b --trainer transformers --method full --no-gradient-checkpointing --batch-size 2 --seq-len 512
# estimate: --strategy zero2 --overlap-comm --offload-optimizer cpu

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)  # the launcher says it
parser.parse_args()
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "zero_force_ds_cpu_optimizer": False,
}
rows = Dataset.from_dict({"input_ids": [list(range(1000, 1512))] * 64, "labels": [list(range(1000, 1512))] * 64})
trainer_arguments = TrainingArguments(
    output_dir="out",
    per_device_train_batch_size=2,
    max_steps=20,
    bf16=True,
    report_to="none",
    deepspeed=DEEPSPEED,
)
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype="bfloat16")
trainer = Trainer(model=model, args=trainer_arguments, train_dataset=rows)
trainer.train()
