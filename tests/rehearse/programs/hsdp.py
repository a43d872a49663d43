"""A plain loop under HSDP: FSDP2 over 4 cards of a machine, 2 machines with a copy each, as rank 0 of 8."""
# gpu: 8xrtx-4090
# launcher: torchrun --nnodes 2 --nproc-per-node 4

import os

import torch
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("replicate", "shard"))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
model = nn.Sequential(*(nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True, norm_first=True) for _ in range(8)))
for layer in model:
    fully_shard(layer, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)
model.cuda()
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(10):
    model(torch.randn(4, 512, 1024, device="cuda")).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
