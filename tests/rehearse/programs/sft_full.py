"""TRL's SFTTrainer: full fine-tuning of Llama-3.2-1B in bf16, 2 x 2,048 tokens."""
# gpu: a100-80gb
# estimate: llama-3.2-1b --trainer trl --method full --batch-size 2 --seq-len 2048

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

trainer = SFTTrainer(
    model="meta-llama/Llama-3.2-1B",
    args=SFTConfig(
        output_dir="out",
        per_device_train_batch_size=2,
        max_length=2048,
        max_steps=20,
        bf16=True,
        gradient_checkpointing=True,
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"text": ["word " * 4000] * 64}),
)
trainer.train()
trainer.save_model("out")
