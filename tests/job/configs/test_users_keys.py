"""Keys of users' files whose effect looks like none: a number of 0, a token."""

from __future__ import annotations

from pathlib import Path

import pytest

import peftplan
from peftplan.job.configs.read import read_config
from tests.job.configs.test_users_files import SETTINGS, written

AXOLOTL = "attn_implementation: flash_attention_2\nsequence_len: 512\nmicro_batch_size: 2\nbf16: true\n"


@pytest.mark.parametrize("alpha", ["5", "0", "0.0"])
def test_noise_of_0_is_noise_too(tmp_path: Path, alpha: str) -> None:
    """Trainer adds its hook where the number is not None; that of 0 makes the same tensors (integrations/neftune.py:26)."""
    axolotl = "base_model: Qwen/Qwen3-0.6B\n" + AXOLOTL
    config = written(tmp_path / "a.yaml", f"{axolotl}neftune_noise_alpha: {alpha}\n")
    assert set(read_config(config).unsupported) == {"neftune_noise_alpha"}
    config = written(tmp_path / "b.yaml", f"{SETTINGS}neftune_noise_alpha: {alpha}\n")
    assert "neftune_noise_alpha" in {*read_config(config).unsupported, *read_config(config).read}
    text = "from transformers import AutoModelForCausalLM, Trainer, TrainingArguments\n"
    text += f"args = TrainingArguments('out', neftune_noise_alpha={alpha})\n"
    text += "Trainer(model=AutoModelForCausalLM.from_pretrained('Qwen/Qwen3-0.6B'), args=args).train()\n"
    assert read_config(written(tmp_path / "c.py", text)).options["noisy_embeddings"] is True


@pytest.mark.parametrize(
    ("model", "token", "grows"),
    [
        ("NousResearch/Llama-2-7b-hf", "</s>", False),
        ("NousResearch/Llama-2-7b-hf", "[PAD]", True),
        ("meta-llama/Llama-3.2-1B", "<|end_of_text|>", False),
        ("meta-llama/Llama-3.2-1B", "</s>", True),
        ("Qwen/Qwen2.5-0.5B", "[PAD]", False),
        ("google/gemma-2-2b", "<pad>", False),
        ("google/gemma-2-2b", "[PAD]", True),
        ("mistral-community/pixtral-12b", "<pad>", False),  # mistral_common, tokens/tokenizers/tekken.py
        ("mistral-community/pixtral-12b", "[PAD]", True),
    ],
)
def test_a_token_that_the_vocabulary_lacks_adds_a_row(tmp_path: Path, model: str, token: str, *, grows: bool) -> None:
    """axolotl grows an embedding of fewer rows than the tokenizer has tokens (loaders/model.py:377). Llama's have one for each of
    32,000 or 128,256; Qwen2.5's has 151,936 rows for 151,665 tokens. The row was left out, and the count called exact."""
    axolotl = f"base_model: {model}\n{AXOLOTL}"
    plan = read_config(written(tmp_path / "a.yaml", f'{axolotl}special_tokens:\n  pad_token: "{token}"\n'))
    assert set(plan.unsupported) == ({"special_tokens.pad_token"} if grows else set())


GRPO = """model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
torch_dtype: bfloat16
bf16: true
num_generations: 4
per_device_train_batch_size: 4
max_prompt_length: 512
max_completion_length: 512
use_vllm: true
"""


@pytest.mark.parametrize(
    ("device", "mode", "known"),
    [
        ("vllm_device: auto", "server", True),
        ("vllm_device: cuda:7", "server", True),
        *((f"vllm_device: {device}", "colocate", False) for device in ("cuda:0", "cuda:8", "cuda", "cpu")),
    ],
)
def test_vllm_on_a_card_of_its_own(tmp_path: Path, device: str, mode: str, *, known: bool) -> None:
    """trl 0.15.2, trainer/grpo_trainer.py:374: `auto` is the card behind those that train. trl 1.16.0 calls this a server."""
    plan = read_config(written(tmp_path / "a.yaml", f"{GRPO}{device}\n"))
    assert plan.options.get("vllm_mode") == mode
    assert ("vllm_device" not in plan.unsupported) is known
    assert ("vllm_mode" in plan.assumed) is known


@pytest.mark.parametrize(
    ("model", "dtype", "known"),
    [
        ("allenai/OLMo-2-0425-1B", "", False),
        ("allenai/OLMo-2-0425-1B", ", dtype='auto'", False),
        ("allenai/OLMo-2-0425-1B", ", dtype='bfloat16'", True),
        ("openai-community/gpt2", "", True),
    ],
)
def test_weights_of_a_dtype_that_is_not_known_have_no_peak(tmp_path: Path, model: str, dtype: str, *, known: bool) -> None:
    """transformers 5 loads them as the checkpoint stores them: in fp32 they take twice the bytes of 16 bits."""
    text = (
        "from transformers import AutoModelForCausalLM, Trainer, TrainingArguments\nargs = TrainingArguments('out', bf16=True)\n"
    )
    text += f"Trainer(model=AutoModelForCausalLM.from_pretrained('{model}'{dtype}), args=args).train()\n"
    plan = read_config(written(tmp_path / "a.py", text))
    assert (not plan.unsupported) is known
    assert peftplan.estimate(config=plan, dtype="fp32").bound is None


CUTS = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, TrainingArguments
tokenizer = AutoTokenizer.from_pretrained("google/flan-t5-base")
def cut(example):
    inputs = tokenizer(example["input"], max_length=256, truncation=True)
    inputs["labels"] = tokenizer(text_target=example["target"], max_length=TARGET, truncation=True)["input_ids"]
    return inputs
model = AutoModelForSeq2SeqLM.from_pretrained("google/flan-t5-base")
Trainer(model=model, args=TrainingArguments("out", fp16=True), train_dataset=rows.map(cut)).train()
"""


@pytest.mark.parametrize(("target", "bound"), [(256, None), (128, "at_most"), (512, "at_least")])
def test_targets_of_another_length_than_the_input(tmp_path: Path, target: int, bound: str | None) -> None:
    """Both count as long as the first. Rehearsed with LoRA, 4 rows of 256 tokens: targets of 128 hold 3.05 GB, of 256 3.73 GB."""
    plan = read_config(written(tmp_path / "a.py", CUTS.replace("TARGET", str(target))))
    assert plan.options["seq_len"] == 256
    assert peftplan.estimate(config=plan).bound == bound


def test_ms_swift_has_no_dtype_auto(tmp_path: Path) -> None:
    """Its parser refuses a word that the field's type does not name (arguments/base_args/model_args.py:74)."""
    command = "swift sft --model Qwen/Qwen3-8B --tuner_type lora --torch_dtype auto\n"
    plan = read_config(written(tmp_path / "a.sh", command))
    assert plan.refused["torch_dtype"].instead == {"torch_dtype": None}
    assert plan.options["dtype"] == "bf16"
