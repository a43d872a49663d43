"""What commands of peft's own examples mean."""

from __future__ import annotations

import pytest

from peftplan.job.configs.read import read_text

PEFTS_EXAMPLE = (
    "torchrun --nproc_per_node 8 train.py --model_name_or_path mistralai/Mistral-7B-v0.1 --max_length 2048 --bf16 True"
    " --packing True --per_device_train_batch_size 8 --chat_template_format chatml --splits train,test --use_reentrant False"
    " --use_flash_attn True --use_peft_lora True --lora_r 8 --lora_dropout 0.1 --lora_target_modules all-linear"
    " --use_4bit_quantization True --use_nested_quant True --bnb_4bit_compute_dtype bfloat16"
)


def test_peft_s_examples_have_words_of_their_own() -> None:
    """peft, examples/sft/utils.py: what is not in 4 bits is fp32 unless 4-bit weights are packed in 16 bits."""
    plan = read_text(f"{PEFTS_EXAMPLE}\n", file="run.sh")
    assert not plan.unsupported
    stored = {"quant": "nf4", "double_quant": True, "compute_dtype": "bf16", "quant_storage": "uint8", "dtype": "fp32"}
    shape = {"batch_size": 1, "seq_len": 8 * 2048, "attn_implementation": "flash_attention_2"}
    assert plan.options.items() >= {**stored, **shape, "trainer": "trl", "method": "lora", "r": 8, "gpus": 8}.items()
    assert "eight rows" in plan.assumed["vocabulary"]
    packed = read_text(f"{PEFTS_EXAMPLE} --bnb_4bit_quant_storage_dtype bfloat16\n", file="run.sh")
    assert (packed.options["quant_storage"], packed.options["dtype"]) == ("bf16", "bf16")


@pytest.mark.parametrize("word", ["--use_peft_lora True", "--use_4bit_quantization True"])
def test_peft_s_examples_attend_eagerly_unless_told(word: str) -> None:
    """peft, examples/sft/utils.py: `"flash_attention_2" if args.use_flash_attn else "eager"`; train.py: False by default."""
    lora = "--lora_r 8 --lora_dropout 0.1 --lora_target_modules all-linear"
    plan = read_text(f"python train.py --model_name_or_path gpt2 {word} {lora}\n", file="run.sh")
    assert plan.options["attn_implementation"] == "eager"


def test_peft_s_examples_set_use_reentrant_too_late() -> None:
    """train.py sets `gradient_checkpointing_kwargs` once transformers 5.24 has copied it to `activation_checkpointing_kwargs`,
    which alone its Trainer reads (trainer.py:1507), and which leave checkpoints that are not reentrant (modeling_utils.py:3158).
    """
    plan = read_text(f"{PEFTS_EXAMPLE.replace('--use_reentrant False', '--use_reentrant True')}\n", file="run.sh")
    assert "use_reentrant" not in plan.options
    assert "transformers 5.24" in plan.assumed["use_reentrant"]
    assert "use_reentrant" not in read_text(f"{PEFTS_EXAMPLE}\n", file="run.sh").assumed
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments("unused", gradient_checkpointing=True, use_cpu=True, report_to="none")
    if hasattr(arguments, "activation_checkpointing_kwargs"):
        arguments.gradient_checkpointing_kwargs = {"use_reentrant": True}
        assert arguments.activation_checkpointing_kwargs is None


def test_peft_s_examples_leave_lora_to_their_script() -> None:
    plan = read_text("python train.py --model_name_or_path gpt2 --use_peft_lora True --lora_r 8\n", file="run.sh")
    assert plan.unsupported["use_peft_lora"].effect == "unknown"
