"""transformers' Seq2SeqTrainer: Whisper small, LoRA, 8 recordings of 30 seconds to 128 tokens."""
# gpu: rtx-4090

import torch
from peft import LoraConfig, get_peft_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, WhisperForConditionalGeneration


class Recordings(torch.utils.data.Dataset):
    """Spectra and their text."""

    def __len__(self) -> int:
        return 160

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"input_features": torch.zeros(80, 3000), "labels": torch.full((128,), number)}


model = WhisperForConditionalGeneration.from_pretrained("openai/whisper-small")
model = get_peft_model(model, LoraConfig(r=32, target_modules=["q_proj", "v_proj"]))
trainer = Seq2SeqTrainer(
    model=model,
    args=Seq2SeqTrainingArguments(
        output_dir="out",
        per_device_train_batch_size=8,
        bf16=True,
        max_steps=20,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to="none",
    ),
    train_dataset=Recordings(),
)
trainer.train()
