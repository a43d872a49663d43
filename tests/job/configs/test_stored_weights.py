"""Repositories of quantized weights: a file that names one trains on what it holds, whatever else the file says.

Witness: `AutoHfQuantizer.merge_quantization_configs` (transformers 5.24, quantizers/auto.py) takes the repository's config and
ignores that of the caller; another class of config is an error there.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import peftplan
from peftplan.errors import PeftplanError
from peftplan.job.configs.documents import FileError
from peftplan.job.configs.read import read_text
from peftplan.job.repositories import stored

TRL = "model_name_or_path: NAME\nuse_peft: true\nlora_r: 8\nper_device_train_batch_size: 1\nlearning_rate: 0.0001\n"
LLAMA_FACTORY = "model_name_or_path: NAME\nstage: sft\nfinetuning_type: lora\ntemplate: llama3\nper_device_train_batch_size: 1\n"


@pytest.mark.parametrize(
    ("name", "base", "quant", "bits"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", "unsloth/llama-3-8b", "nf4", None),
        ("TheBloke/Llama-2-7B-GPTQ", "TheBloke/Llama-2-7B", "gptq", 4),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8", "Qwen/Qwen2.5-7B-Instruct", "gptq", 8),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct", "awq", None),
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", "hugging-quants/Meta-Llama-3.1-8B-Instruct", "awq", None),
        ("ISTA-DASLab/Meta-Llama-3-8B-AQLM-2Bit-1x16", "ISTA-DASLab/Meta-Llama-3-8B", None, None),
    ],
)
def test_names(name: str, base: str, quant: str | None, bits: int | None) -> None:
    weights = stored(name)
    assert weights is not None
    assert (weights.name, weights.options.get("quant"), weights.options.get("quant_bits")) == (base, quant, bits)


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "gptq", "owner/gptq-experiments-7b", "Qwen/Qwen3-8B"])
def test_other_names_say_nothing_of_their_weights(name: str) -> None:
    assert stored(name) is None


def test_weights_in_4_bits_are_loaded_so_by_every_tool() -> None:
    """Llama 3 8B: 6,979,321,856 weights of linear layers in half a byte, where 16 bits take two."""
    small, large = (
        peftplan.estimate(config=read_text(LLAMA_FACTORY.replace("NAME", name), file="a.yml"))
        for name in ("unsloth/llama-3-8b-bnb-4bit", "unsloth/llama-3-8b")
    )
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert linear == 6_979_321_856
    sizes = [each.ledger.by_category()["weights"] for each in (large, small)]
    assert sizes[0] - sizes[1] == pytest.approx(linear * 1.5, rel=1e-3)
    assert small.trainable_parameters == large.trainable_parameters
    assert small.assumptions["kbit_prepare"] is False


def test_gptq_has_counts_and_no_peak() -> None:
    result = peftplan.estimate(config=read_text(TRL.replace("NAME", "TheBloke/Llama-2-7B-GPTQ"), file="a.yml"))
    assert result.total_parameters - result.trainable_parameters == 6_738_415_616
    assert result.peaks is None
    assert "4 bits in groups of 128" in result.config["assumed"]["model"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (TRL.replace("NAME", "ISTA-DASLab/Meta-Llama-3-8B-AQLM-2Bit-1x16"), "not known"),
        (TRL.replace("NAME", "unsloth/llama-3-8b-unsloth-bnb-4bit"), "some layers in 16 bits"),
        (TRL.replace("NAME", "TheBloke/Llama-2-7B-GPTQ") + "load_in_4bit: true\n", "raises an error"),
        (TRL.replace("NAME", "TheBloke/Llama-2-7B-GPTQ").replace("use_peft: true\nlora_r: 8\n", ""), "full fine-tuning"),
    ],
)
def test_what_is_not_known_of_them(text: str, why: str) -> None:
    assert why in read_text(text, file="a.yml").unsupported["model_name_or_path"].why


def test_layers_in_16_bits_are_those_of_the_list_that_is_known() -> None:
    """As Unsloth's own files have them; the name of another repository of Unsloth's says nothing of its layers."""
    plan = read_text(TRL.replace("NAME", "unsloth/qwen3-14b-unsloth-bnb-4bit"), file="a.yml")
    skipped = ("lm_head", *(f"model.layers.{number}.mlp" for number in (3, 37, 38)))
    assert (dict(plan.unsupported), plan.options["quant_skip_modules"]) == ({}, skipped)
    assert "model.layers.37.mlp" in plan.assumed["model"]


def test_experts_that_unsloth_alone_stores_in_4_bits() -> None:
    """gpt-oss 20B takes 14.9 GiB in Unsloth; counted as nf4 is, its experts stay in 16 bits, in 75.8 GiB of fp32 with TRL."""
    text = TRL.replace("NAME", "unsloth/gpt-oss-20b-unsloth-bnb-4bit") + "lora_target_modules: [q_proj]\n"
    plan = read_text(text, file="a.yml")
    assert "each expert" in plan.unsupported["model_name_or_path"].why
    assert peftplan.estimate(config=plan).peaks is None


@pytest.mark.parametrize(
    "name", ["ybelkada/Mistral-7B-v0.1-bf16-sharded", "yahma/llama-7b-hf", "vilsonrodrigues/falcon-7b-sharded"]
)
def test_copies_in_other_files(name: str) -> None:
    plan = read_text(TRL.replace("NAME", name), file="a.yml")
    assert plan.model != name
    assert "by its name" in plan.assumed["model"]


@pytest.mark.parametrize(
    "name",
    ["unsloth/phi-4", "unsloth/phi-4-bnb-4bit", "unsloth/Phi-3-mini-4k-instruct-bnb-4bit", "THUDM/glm-4-9b", "allenai/OLMo-7B"],
)
def test_repositories_with_other_layers_are_not_the_model_of_their_name(name: str) -> None:
    """Unsloth's notebook trains 65,536,000 parameters of unsloth/phi-4, where Microsoft's four matrices of a layer get fewer."""
    plan = read_text(LLAMA_FACTORY.replace("NAME", name), file="a.yml")
    assert plan.model == name
    assert "holds" not in plan.assumed.get("model", "")


def test_an_optimizer_that_transformers_5_does_not_have() -> None:
    """`OptimizerNames` of transformers 4.57 has adamw_hf, that of 5.24 has not: the file has counts and no peak."""
    plan = read_text(TRL.replace("NAME", "gpt2") + "optim: adamw_hf\n", file="a.yml")
    assert plan.unsupported["optim"].option == "optim"
    assert peftplan.estimate(config=plan).peaks is None


SCRIPT = """# Databricks notebook source
%pip install -U transformers
model = AutoModelForSequenceClassification.from_pretrained("google-bert/bert-base-uncased", num_labels=len(LABELS))
tokenizer(texts, truncation=True, max_length=longest)
trainer = Trainer(model=model, args=TrainingArguments(per_device_train_batch_size=8))
trainer.train()
"""


def test_what_a_program_takes_from_its_data_is_assumed() -> None:
    """The number of classes and the longest text are the data's; the issue of a missing length treats them alike."""
    plan = read_text(SCRIPT, file="a.py")
    assert (plan.tool, plan.unsupported) == ("transformers-script", {})
    assert plan.options["num_labels"] == 2
    assert {"num_labels", "seq_len"} <= plan.assumed.keys()


MODEL = (
    '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, '
    '"num_attention_heads": 4, "vocab_size": 100}'
)


def test_a_model_outside_the_config_s_tree_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder beside the config is read; one above it only where the user names it. A name that is built in says it all."""
    (tmp_path / "configs" / "own").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path / "configs")
    for folder in ("configs/own", "other", "gpt2"):
        (tmp_path / folder / "config.json").write_text(MODEL, encoding="utf-8")
    assert read_text(TRL.replace("NAME", "./own"), file="a.yml").model == "./own"
    assert read_text(TRL.replace("NAME", "../gpt2"), file="a.yml").model == "gpt2"
    (tmp_path / "configs" / "linked").mkdir()
    (tmp_path / "configs" / "linked" / "config.json").symlink_to(tmp_path / "other" / "config.json")
    for outside in ("../other", str(tmp_path / "other"), "./linked"):
        with pytest.raises(FileError, match="outside the config's folder"):
            read_text(TRL.replace("NAME", outside), file="a.yml")


@pytest.mark.parametrize(
    ("command", "tool"),
    [
        ("python src/train.py --stage sft --model_name_or_path gpt2", "llamafactory"),
        ("python my_train.py --finetuning_type lora --stage sft --model_name_or_path gpt2", "llamafactory"),
        ("python my_train.py --stage sft --model_name_or_path gpt2", "other"),
        ("python my_train.py --finetuning_type lora --stage sft --model_name_or_path gpt2 --my_option 1", "other"),
    ],
)
def test_a_script_of_an_unknown_name_is_llamafactory_s_by_its_own_options(command: str, tool: str) -> None:
    assert read_text(f"#!/bin/bash\n{command}\n", file="a.sh").tool == tool


def test_the_name_of_a_repository_that_cannot_be_read_says_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As MODEL, without a connection: the bytes of the model that it copies, with the storage that its name says."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    job: dict[str, object] = {"method": "lora", "seq_len": 512}
    by_name = peftplan.estimate("unsloth/llama-3-8b-bnb-4bit", **job)
    stated = peftplan.estimate("meta-llama/Meta-Llama-3-8B", quant="nf4", double_quant=True, compute_dtype="bf16", **job)
    assert by_name.peaks is not None
    assert stated.peaks is not None
    assert (by_name.peaks.allocated, by_name.peaks.reserved) == (stated.peaks.allocated, stated.peaks.reserved)
    assert "holds meta-llama/Meta-Llama-3-8B, by its name" in str(by_name.assumptions["notes"])
    packed = peftplan.estimate("TheBloke/Llama-2-7B-GPTQ", method="lora").ledger.by_category()
    assert packed["weights"] < 4 * 2**30
    with pytest.raises(PeftplanError, match="HF_HUB_OFFLINE"):
        peftplan.estimate("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", method="lora")
    with pytest.raises(PeftplanError, match="name the repository that stores 16 bits"):
        peftplan.estimate("unsloth/llama-3-8b-bnb-4bit", method="full")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (TRL.replace("NAME", "Qwen/Qwen2.5-7B") + "load_in_4bit: true\nbnb_4bit_quant_type: gptq\n", "bnb_4bit_quant_type"),
        (
            LLAMA_FACTORY.replace("NAME", "Qwen/Qwen2.5-7B") + "quantization_bit: 4\nquantization_type: awq\n",
            "quantization_type",
        ),
    ],
)
def test_bitsandbytes_has_two_types_of_4_bits(text: str, key: str) -> None:
    """`quantize_4bit` raises ValueError for others."""
    plan = read_text(text, file="a.yml")
    assert "its types of 4 bits are nf4 and fp4" in plan.unsupported[key].why
