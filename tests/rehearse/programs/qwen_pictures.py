"""TRL's SFTTrainer on images: LoRA on Qwen2.5-VL-3B, 2 conversations with an image of 448 x 448."""
# gpu: a100-80gb
# needs: pillow torchvision

from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import SFTConfig, SFTTrainer

ROW = {
    "images": [Image.new("RGB", (448, 448))],
    "messages": [{"role": "user", "content": "What is in the picture?"}, {"role": "assistant", "content": "A blank page. " * 40}],
}
trainer = SFTTrainer(
    model="Qwen/Qwen2.5-VL-3B-Instruct",
    args=SFTConfig(
        output_dir="out",
        per_device_train_batch_size=2,
        max_length=None,
        max_steps=20,
        bf16=True,
        gradient_checkpointing=True,
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
    ),
    train_dataset=Dataset.from_list([ROW] * 64),
    peft_config=LoraConfig(r=16, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
