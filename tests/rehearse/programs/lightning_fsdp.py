"""Lightning's own launcher and FSDP strategy, as rank 0 of 8: a transformer of 24 layers, a sharded checkpoint each epoch."""
# gpu: 8xa100-40gb
# needs: lightning

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH, LENGTH, VOCABULARY = 1024, 512, 32000


class Language(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 16, 4 * WIDTH, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=tokens.device)
        return self.head(self.layers(self.embed(tokens), mask=mask, is_causal=True))

    def loss(self, batch: list[torch.Tensor], name: str) -> torch.Tensor:
        tokens = batch[0]
        loss = nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        self.log(name, loss, prog_bar=True, sync_dist=True)
        return loss

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        return self.loss(batch, "train_loss")

    def validation_step(self, batch: list[torch.Tensor], number: int) -> None:
        self.loss(batch, "val_loss")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


if __name__ == "__main__":
    rows = TensorDataset(torch.randint(0, VOCABULARY, (256, LENGTH + 1)))
    layers = {nn.TransformerEncoderLayer}
    trainer = lightning.Trainer(
        devices=8,
        precision="bf16-mixed",
        max_epochs=10,
        limit_train_batches=1,
        limit_val_batches=1,
        strategy=FSDPStrategy(auto_wrap_policy=layers, activation_checkpointing_policy=layers, state_dict_type="sharded"),
        callbacks=[ModelCheckpoint("checkpoints", monitor="val_loss"), EarlyStopping("val_loss", patience=1)],
        logger=False,
    )
    trainer.fit(Language(), DataLoader(rows, 4, num_workers=2), DataLoader(rows, 4))
