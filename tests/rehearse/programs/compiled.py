"""A plain loop over blocks that torch compiles, by inductor's defaults: norm, two linear layers, GELU."""
# gpu: rtx-4090

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width=1024):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


model = nn.Sequential(*(Block() for _ in range(4))).to("cuda", torch.bfloat16)
for block in model:
    block.compile()
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(10):
    loss = model(torch.randn(8, 512, 1024, dtype=torch.bfloat16, device="cuda")).float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
