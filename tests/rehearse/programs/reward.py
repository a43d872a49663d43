"""TRL's RewardTrainer: LoRA on Qwen2.5-0.5B with a scalar head, 4 pairs of up to 512 tokens."""
# gpu: rtx-4090
# estimate: qwen2.5-0.5b --trainer trl-reward --method lora --r 16 --target-modules all-linear --batch-size 4 --seq-len 481

from datasets import Dataset
from peft import LoraConfig
from trl import RewardConfig, RewardTrainer

pairs = {"prompt": ["ask " * 20] * 64, "chosen": ["good " * 80] * 64, "rejected": ["poor " * 80] * 64}
trainer = RewardTrainer(
    model="Qwen/Qwen2.5-0.5B",
    args=RewardConfig(
        output_dir="out",
        per_device_train_batch_size=4,
        max_length=512,
        max_steps=20,
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
    ),
    train_dataset=Dataset.from_dict(pairs),
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS"),
)
trainer.train()
