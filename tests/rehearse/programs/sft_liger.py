"""TRL's SFTTrainer with Liger's kernels: full fine-tuning of Qwen2.5-0.5B, 2 x 2,048 tokens."""
# gpu: rtx-4090
# needs: liger-kernel
# estimate: qwen2.5-0.5b --trainer trl --method full --batch-size 2 --seq-len 2048 --kernels liger

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

trainer = SFTTrainer(
    model="Qwen/Qwen2.5-0.5B",
    args=SFTConfig(
        output_dir="out",
        per_device_train_batch_size=2,
        max_length=2048,
        use_liger_kernel=True,
        max_steps=20,
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"text": ["word " * 4000] * 64}),
)
trainer.train()
