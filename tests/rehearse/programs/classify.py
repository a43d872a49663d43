"""transformers' Trainer: BERT for sequence classification, full fine-tuning, 32 x 128 tokens."""
# gpu: t4
# estimate: bert-base-uncased --task-type SEQ_CLS --num-labels 2 --batch-size 32 --seq-len 128 --method full
# estimate: --trainer transformers --dtype fp32 --autocast fp16 --no-gradient-checkpointing

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

tokenizer = AutoTokenizer.from_pretrained("google-bert/bert-base-uncased")
rows = Dataset.from_dict({"text": ["a film worth seeing " * 40] * 320, "label": [0, 1] * 160})
rows = rows.map(
    lambda row: tokenizer(row["text"], truncation=True, max_length=128, padding="max_length"), remove_columns=["text"]
)
trainer = Trainer(
    model=AutoModelForSequenceClassification.from_pretrained("google-bert/bert-base-uncased", num_labels=2),
    args=TrainingArguments(output_dir="out", per_device_train_batch_size=32, fp16=True, max_steps=20, report_to="none"),
    train_dataset=rows,
)
trainer.train()
