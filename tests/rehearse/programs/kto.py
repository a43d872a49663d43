"""TRL's KTOTrainer: LoRA on Qwen2.5-0.5B, 4 completions of up to 1,024 tokens."""
# gpu: rtx-4090
# estimate: qwen2.5-0.5b --trainer trl-kto --method lora --r 16 --target-modules all-linear --batch-size 4 --seq-len 901
# estimate: --max-completion-length 701

from datasets import Dataset
from peft import LoraConfig
from trl import KTOConfig, KTOTrainer

rows = {"prompt": ["ask " * 50] * 64, "completion": ["answer " * 100] * 64, "label": [True, False] * 32}
trainer = KTOTrainer(
    model="Qwen/Qwen2.5-0.5B",
    args=KTOConfig(
        output_dir="out",
        per_device_train_batch_size=4,
        max_length=1024,
        max_steps=20,
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
    ),
    train_dataset=Dataset.from_dict(rows),
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
