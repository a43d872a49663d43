"""TRL's SFTTrainer: full fine-tuning of Qwen2.5-0.5B under DeepSpeed ZeRO-3, as rank 0 of 4."""
# gpu: 4xrtx-4090
# launcher: deepspeed --num_gpus 4
# needs: deepspeed
# estimate: qwen2.5-0.5b --trainer trl --method full --strategy zero3 --batch-size 2 --seq-len 1024

import argparse

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)  # the launcher says it
parser.parse_args()
trainer = SFTTrainer(
    model="Qwen/Qwen2.5-0.5B",
    args=SFTConfig(
        output_dir="out",
        per_device_train_batch_size=2,
        max_length=1024,
        max_steps=20,
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3},
        },
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"text": ["word " * 2000] * 64}),
)
trainer.train()
