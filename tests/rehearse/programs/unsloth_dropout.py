"""Unsloth with dropout before the adapters, which its kernels draw for each projection: QLoRA on Llama-3.2-1B, 2 x 2,048."""
# gpu: rtx-4090
# needs: unsloth
# estimate: --config {file}

from unsloth import FastLanguageModel  # isort: skip  # it has to come first
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained(
    "meta-llama/Llama-3.2-1B", max_seq_length=2048, load_in_4bit=True, use_exact_model_name=True
)
model = FastLanguageModel.get_peft_model(model, r=16, lora_dropout=0.05, use_gradient_checkpointing="unsloth")
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    args=SFTConfig(output_dir="out", per_device_train_batch_size=2, max_length=2048, max_steps=20, bf16=True, report_to="none"),
    train_dataset=Dataset.from_dict({"text": ["word " * 4000] * 64}),
)
trainer.train()
