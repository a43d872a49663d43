"""transformers' Seq2SeqTrainer: T5-base, full fine-tuning with Adafactor, 8 x 512 to 128 tokens."""
# gpu: rtx-4090

from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

NAME = "google-t5/t5-base"
tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForSeq2SeqLM.from_pretrained(NAME)
rows = {"input_ids": [list(range(1000, 1512))] * 160, "labels": [list(range(2000, 2128))] * 160}
trainer = Seq2SeqTrainer(
    model=model,
    args=Seq2SeqTrainingArguments(
        output_dir="out",
        per_device_train_batch_size=8,
        optim="adafactor",
        bf16=True,
        predict_with_generate=True,
        max_steps=20,
        report_to="none",
    ),
    train_dataset=Dataset.from_dict(rows),
    data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
)
trainer.train()
