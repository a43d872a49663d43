"""transformers' Trainer: BERT for token classification, full fine-tuning, 16 x 256 tokens."""
# gpu: t4
# estimate: bert-base-cased --task-type TOKEN_CLS --num-labels 9 --batch-size 16 --seq-len 256 --method full
# estimate: --trainer transformers --dtype fp32 --autocast fp16 --no-gradient-checkpointing

from datasets import Dataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

tokenizer = AutoTokenizer.from_pretrained("google-bert/bert-base-cased")
rows = {"input_ids": [list(range(1000, 1256))] * 320, "labels": [[n % 9 for n in range(256)]] * 320}
trainer = Trainer(
    model=AutoModelForTokenClassification.from_pretrained("google-bert/bert-base-cased", num_labels=9),
    args=TrainingArguments(output_dir="out", per_device_train_batch_size=16, fp16=True, max_steps=20, report_to="none"),
    train_dataset=Dataset.from_dict(rows),
    data_collator=DataCollatorForTokenClassification(tokenizer),
)
trainer.train()
