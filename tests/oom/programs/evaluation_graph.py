"""Evaluates without torch.no_grad() and keeps every loss."""

import sys

import torch

torch.cuda.memory._record_memory_history(stacks="python")
model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(4))).cuda()
optimizer = torch.optim.AdamW(model.parameters())


def batch():
    return torch.randn(8192, 4096, device="cuda")


def train():
    for _ in range(3):
        model(batch()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def measure():
    losses = []
    while True:
        losses.append(model(batch()).pow(2).mean())


try:
    train()
    measure()
finally:
    torch.cuda.memory._dump_snapshot(sys.argv[1])
