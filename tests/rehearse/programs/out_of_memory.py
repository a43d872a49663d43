"""A job that does not fit a 24 GB card: full fine-tuning of Llama-3.2-3B by transformers' Trainer."""
# gpu: rtx-4090
# exit: 1
# estimate: llama-3.2-3b --trainer transformers --method full --no-gradient-checkpointing --batch-size 4 --seq-len 1024

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

NAME = "meta-llama/Llama-3.2-3B"
tokenizer = AutoTokenizer.from_pretrained(NAME)
rows = Dataset.from_dict({"input_ids": [list(range(1000, 2024))] * 64})
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(NAME, dtype="bfloat16"),
    args=TrainingArguments(output_dir="out", per_device_train_batch_size=4, bf16=True, max_steps=20, report_to="none"),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
