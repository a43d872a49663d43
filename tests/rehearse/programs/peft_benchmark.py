"""A loop set up as peft's own benchmark of methods: LoRA on Llama-3.2-3B, 4 rows of many lengths up to 768 tokens."""
# gpu: rtx-4090

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

NAME, ROWS, MOST = "meta-llama/Llama-3.2-3B", 4, 768
tokenizer = AutoTokenizer.from_pretrained(NAME)
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.bfloat16, device_map="cuda")
model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, task_type="CAUSAL_LM"))
texts = ["a question and its answer " * (8 + 13 * n % 140) for n in range(320)]


def batch_of(rows: list[str]) -> dict[str, torch.Tensor]:
    return tokenizer(rows, truncation=True, max_length=MOST, padding=True, return_tensors="pt").to(model.device)


@torch.inference_mode()
def loss_per_token(rows: list[str]) -> float:
    """The mean loss of rows, before and after training: how much the model forgets."""
    losses = []
    for start in range(0, len(rows), ROWS):
        batch = batch_of(rows[start : start + ROWS])
        for logit, target, mask in zip(model(**batch).logits, batch["input_ids"], batch["attention_mask"], strict=True):
            losses.append(torch.nn.functional.cross_entropy(logit[-mask.sum() :], target[-mask.sum() :]))
    return torch.stack(losses).mean().item()


model.eval()
print("before", loss_per_token(texts[:8]))
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=10, num_training_steps=80)
texts.sort(key=len, reverse=True)  # in buckets, so that rows of a batch are of like length
for step in range(1, 81):
    batch = batch_of(texts[ROWS * (step - 1) : ROWS * step])
    labels = batch["input_ids"].clone()
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        labels[row, length + 1 :] = -100
    optimizer.zero_grad()
    loss = model(**batch, labels=labels, num_items_in_batch=batch["attention_mask"].sum().item()).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 10 == 0:
        torch.cuda.empty_cache()
model.eval()
print("after", loss_per_token(texts[:8]))
