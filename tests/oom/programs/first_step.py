"""The optimizer's states do not fit beside weights and gradients."""

import sys

import torch

torch.cuda.memory._record_memory_history(stacks="python")
model = torch.nn.Sequential(*(torch.nn.Linear(16384, 16384, bias=False) for _ in range(5))).cuda()
optimizer = torch.optim.AdamW(model.parameters())

try:
    model(torch.randn(64, 16384, device="cuda")).sum().backward()
    optimizer.step()
finally:
    torch.cuda.memory._dump_snapshot(sys.argv[1])
