"""The same under DistributedDataParallel, as rank 0 of 8."""
# gpu: 8xrtx-4090
# launcher: torchrun --nproc-per-node 8

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("nccl")
device = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(device)
model = DistributedDataParallel(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).cuda(), device_ids=[device])
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(10):
    loss = model(torch.randn(512, 1024, device="cuda")).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
dist.barrier()
dist.destroy_process_group()
