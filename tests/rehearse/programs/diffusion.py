"""A diffusion loop (diffusers and accelerate): LoRA on a UNet with cross-attention, 4 latents of 64 x 64."""
# gpu: rtx-4090
# needs: diffusers

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig

accelerator = Accelerator(mixed_precision="fp16")
unet = UNet2DConditionModel(
    sample_size=64, block_out_channels=(160, 320, 640, 640), cross_attention_dim=768, attention_head_dim=8
)
unet.requires_grad_(False)
unet.to(accelerator.device, dtype=torch.float16)
unet.add_adapter(LoraConfig(r=16, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
for parameter in trained:
    parameter.data = parameter.data.float()
optimizer = torch.optim.AdamW(trained, lr=1e-4)
unet, optimizer = accelerator.prepare(unet, optimizer)
scheduler = DDPMScheduler()
unet.train()
for _ in range(20):
    with accelerator.accumulate(unet):
        latents = torch.randn(4, 4, 64, 64, device=accelerator.device, dtype=torch.float16)
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (4,), device=accelerator.device)
        text = torch.randn(4, 77, 768, device=accelerator.device, dtype=torch.float16)
        predicted = unet(scheduler.add_noise(latents, noise, times), times, text).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
