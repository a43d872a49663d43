"""TRL's GRPOTrainer without vLLM: LoRA on Qwen2.5-0.5B, 8 completions of 64 tokens."""
# gpu: rtx-4090
# estimate: qwen2.5-0.5b --trainer trl-grpo --method lora --r 16 --target-modules all-linear --batch-size 8
# estimate: --num-generations 8 --max-prompt-length 800 --max-completion-length 64

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer


def length(completions: list[str], **_: object) -> list[float]:
    """The reward: how long a completion is."""
    assert all(completions), "a completion is empty"
    return [float(len(text)) for text in completions]


trainer = GRPOTrainer(
    model="Qwen/Qwen2.5-0.5B",
    reward_funcs=length,
    args=GRPOConfig(
        output_dir="out",
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=64,
        max_steps=20,
        bf16=True,
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"prompt": ["ask " * 200] * 64}),
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
