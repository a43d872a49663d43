"""One batch is eight times as long as the others."""

import sys

import torch

torch.cuda.memory._record_memory_history(stacks="python")
layers = (torch.nn.Sequential(torch.nn.Linear(2048, 8192), torch.nn.GELU(), torch.nn.Linear(8192, 2048)) for _ in range(6))
model = torch.nn.Sequential(*layers).cuda()
optimizer = torch.optim.AdamW(model.parameters())

try:
    for step in range(4):
        rows = 8192 if step < 3 else 65536
        model(torch.randn(rows, 2048, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
finally:
    torch.cuda.memory._dump_snapshot(sys.argv[1])
