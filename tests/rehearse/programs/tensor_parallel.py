"""transformers' own tensor parallelism: full fine-tuning of Llama-3.2-1B in a loop, as rank 0 of 4."""
# gpu: 4xrtx-4090
# launcher: torchrun --nproc-per-node 4

import os

import torch
from transformers import AutoModelForCausalLM

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B", dtype="bfloat16", tp_plan="auto")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
model.train()
for _ in range(20):
    tokens = torch.arange(1024, device="cuda").unsqueeze(0)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
