"""A PyTorch Lightning loop: LoRA on Qwen2.5-0.5B in bf16, 2 x 512 tokens."""
# gpu: rtx-4090
# needs: lightning

import lightning
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


class Tuned(lightning.LightningModule):
    """A language model and its loss."""

    def __init__(self) -> None:
        super().__init__()
        base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype="bfloat16")
        self.model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))

    def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-4)


rows = DataLoader([torch.arange(512)] * 64, batch_size=2)
trainer = lightning.Trainer(max_steps=20, precision="bf16-mixed", logger=False, accelerator="gpu", devices=1)
trainer.fit(Tuned(), rows)
