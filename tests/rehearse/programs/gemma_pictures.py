"""transformers' Trainer on images: LoRA on Gemma 3 4B, 2 conversations with an image of 896 x 896."""
# gpu: a100-80gb
# needs: pillow torchvision

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

NAME = "google/gemma-3-4b-it"
processor = AutoProcessor.from_pretrained(NAME)
picture = {"type": "image", "image": Image.new("RGB", (896, 896))}
ask = {"role": "user", "content": [picture, {"type": "text", "text": "What is in the picture?"}]}
answer = {"role": "assistant", "content": [{"type": "text", "text": "A blank page. " * 40}]}


def collate(rows: list[int]) -> dict[str, torch.Tensor]:
    """A batch of the same conversation."""
    batch = processor.apply_chat_template(
        [[ask, answer]] * len(rows), tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    return {**batch, "labels": batch["input_ids"].clone()}


model = AutoModelForImageTextToText.from_pretrained(NAME, dtype=torch.bfloat16)
model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
model.enable_input_require_grads()
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="out",
        per_device_train_batch_size=2,
        max_steps=20,
        bf16=True,
        gradient_checkpointing=True,
        remove_unused_columns=False,
        report_to="none",
    ),
    train_dataset=list(range(64)),
    data_collator=collate,
)
trainer.train()
