"""TRL's SFTTrainer: QLoRA on Llama-3.2-1B, 4 x 2,048 tokens."""
# gpu: a100-80gb
# estimate: llama-3.2-1b --trainer trl --method qlora --r 16 --batch-size 4 --seq-len 2048

from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
)
trainer = SFTTrainer(
    model="meta-llama/Llama-3.2-1B",
    args=SFTConfig(
        output_dir="out",
        per_device_train_batch_size=4,
        max_length=2048,
        max_steps=20,
        bf16=True,
        gradient_checkpointing=True,
        model_init_kwargs={"dtype": "bfloat16", "quantization_config": NF4},
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"text": ["word " * 4000] * 64}),
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model("out")
