"""transformers' Trainer on two cards without a launcher, which wraps the model in DataParallel: BERT, 16 x 128 tokens a card."""
# gpu: 2xt4

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

rows = {"input_ids": [list(range(1000, 1128))] * 320, "label": [0, 1] * 160}
trainer = Trainer(
    model=AutoModelForSequenceClassification.from_pretrained("google-bert/bert-base-uncased", num_labels=2),
    args=TrainingArguments(output_dir="out", per_device_train_batch_size=16, fp16=True, max_steps=20, report_to="none"),
    train_dataset=Dataset.from_dict(rows),
)
trainer.train()
