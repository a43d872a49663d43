"""TRL's SFTTrainer: LoRA on Qwen2.5-0.5B, rows of many lengths packed into 2 x 2,048 tokens (`bfd`)."""
# gpu: rtx-4090
# estimate: qwen2.5-0.5b --trainer trl --method lora --r 16 --target-modules all-linear --padding --batch-size 1 --seq-len 4096

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

trainer = SFTTrainer(
    model="Qwen/Qwen2.5-0.5B",
    args=SFTConfig(
        output_dir="out",
        per_device_train_batch_size=2,
        max_length=2048,
        packing=True,
        max_steps=20,
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"text": ["word " * (100 + 37 * n % 1900) for n in range(256)]}),
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
