"""The first batch does not fit: no step has run, and nothing is kept."""

import sys

import torch

torch.cuda.memory._record_memory_history(stacks="python")
model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(24))).cuda()

try:
    model(torch.randn(65536, 4096, device="cuda")).sum().backward()
finally:
    torch.cuda.memory._dump_snapshot(sys.argv[1])
