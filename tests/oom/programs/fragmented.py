"""Batches grow, and a small tensor stays in the block that each leaves: no freed block holds the next batch."""

import sys

import torch

torch.cuda.memory._record_memory_history(stacks="python")
MIB = 2**20
kept = []

try:
    for step in range(60):
        size = 512 + 32 * step
        batch = torch.empty(size * MIB, device="cuda", dtype=torch.int8)
        del batch
        most = torch.empty((size - 12) * MIB, device="cuda", dtype=torch.int8)
        kept.append(torch.empty(12 * MIB, device="cuda", dtype=torch.int8))
        del most
finally:
    torch.cuda.memory._dump_snapshot(sys.argv[1])
