"""accelerate's own loop: Qwen2.5-0.5B, LoRA, gradient accumulation."""
# gpu: rtx-4090
# launcher: accelerate launch --num_processes 4 --multi_gpu --mixed_precision bf16
# estimate: qwen2.5-0.5b --trainer transformers --method lora --r 8 --target-modules q_proj,v_proj --strategy ddp
# estimate: --gpus 4 --no-gradient-checkpointing --gradient-accumulation-steps 2 --batch-size 2 --seq-len 1024
# estimate: --set find_unused_parameters=false

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

accelerator = Accelerator(gradient_accumulation_steps=2)
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype="bfloat16")
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
rows = [{"input_ids": torch.randint(1000, (1024,))} for _ in range(400)]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=2))
model.train()
for batch in batches:
    with accelerator.accumulate(model):
        loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
