"""TRL's DPOTrainer: LoRA on Llama-3.2-1B, 2 pairs, the switched-off adapter as reference."""
# gpu: rtx-4090
# estimate: llama-3.2-1b --trainer trl-dpo --method lora --r 16 --target-modules all-linear --batch-size 2 --seq-len 1024
# estimate: --max-completion-length 524

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

pairs = {"prompt": ["ask " * 500] * 64, "chosen": ["good " * 500] * 64, "rejected": ["poor " * 500] * 64}
trainer = DPOTrainer(
    model="meta-llama/Llama-3.2-1B",
    args=DPOConfig(
        output_dir="out",
        per_device_train_batch_size=2,
        max_length=1024,
        max_steps=20,
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
    ),
    train_dataset=Dataset.from_dict(pairs),
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
