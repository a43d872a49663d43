"""TRL's SFTTrainer: LoRA on Llama-3.2-1B, 4 x 2,048 tokens."""
# gpu: a100-80gb
# estimate: llama-3.2-1b --trainer trl --method lora --r 16 --batch-size 4 --seq-len 2048

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

trainer = SFTTrainer(
    model="meta-llama/Llama-3.2-1B",
    args=SFTConfig(
        output_dir="out",
        per_device_train_batch_size=4,
        max_length=2048,
        max_steps=20,
        bf16=True,
        gradient_checkpointing=True,
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"text": ["word " * 4000] * 64}),
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model("out")
