"""In which dtype a model is loaded where a program or a file names none: that of its checkpoint, from transformers 5 on."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan import Script
from peftplan.arch import catalogue
from peftplan.datafiles import load
from peftplan.dtypes import MODEL_DTYPES
from peftplan.job.configs.read import read_text
from peftplan.job.sources import checkpoint_dtype, load_config
from tests.job.configs.files import read

PROGRAM = """
model = AutoModelForSequenceClassification.from_pretrained("{model}", num_labels=2{dtype})
args = TrainingArguments(output_dir="o", per_device_train_batch_size=8)
data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128))
Trainer(model=model, args=args, train_dataset=data).train()
"""


def estimated(model: str, dtype: str = "", **more: Any) -> peftplan.Estimate:
    """What a program of transformers' Trainer needs."""
    return peftplan.estimate(config=read_text(PROGRAM.format(model=model, dtype=dtype), file="run.py"), **more)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ("bert-base-uncased", "fp32"),  # its config says float32
        ("google-bert/bert-large-uncased", "fp32"),  # its config says nothing, its weights are of 4 bytes
        ("microsoft/deberta-v3-base", "fp16"),
        ("meta-llama/Llama-2-7b-hf", "fp16"),
        ("Qwen/Qwen2.5-0.5B", "bf16"),
        ("google/gemma-2-2b", "fp32"),
    ],
)
def test_a_program_without_a_dtype_loads_that_of_the_checkpoint(model: str, dtype: str) -> None:
    word = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]
    of_checkpoint = estimated(model)
    assert of_checkpoint.assumptions["dtype"] == dtype
    assert of_checkpoint.peaks == estimated(model, f", dtype=torch.{word}").peaks == estimated(model, ", dtype='auto'").peaks
    assert not [note for note in of_checkpoint.assumptions.get("notes", ()) if "is counted" in note]


def test_transformers_4_loads_in_fp32() -> None:
    before = Script(transformers="4.57.1")
    assert estimated("Qwen/Qwen2.5-0.5B", script=before).assumptions["dtype"] == "fp32"
    assert estimated("Qwen/Qwen2.5-0.5B", ", dtype='auto'", script=before).assumptions["dtype"] == "bf16"


def test_a_dtype_that_nobody_knows_is_said() -> None:
    """Gemma 2 2B's instruct model is stored in other bits than its base, in whose place it is read."""
    result = estimated("google/gemma-2-2b-it")
    assert result.assumptions["dtype"] == "bf16"
    assert [note for note in result.assumptions["notes"] if "not known here; bf16 is counted" in note]
    chosen = peftplan.estimate("gemma-2-2b-it", dtype="auto")
    assert [note for note in chosen.assumptions["notes"] if "not known here; bf16 is counted" in note]


def test_dtypes_of_checkpoints_whose_configs_name_none() -> None:
    for pattern, (dtype, source) in load("checkpoint_dtypes.json", dict)["dtypes"].items():
        names = [entry.name for entry in catalogue.models() if fnmatchcase(entry.name, pattern)]
        assert names, pattern
        assert dtype in MODEL_DTYPES, pattern
        assert source, pattern
        for name in names:
            config = load_config(name)
            assert {"dtype", "torch_dtype"}.isdisjoint(config) or checkpoint_dtype(name, config) == dtype, name


def test_transformers_takes_the_dtype_of_the_config_else_of_the_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, max_position_embeddings=4
    )
    transformers.BertModel(config).half().save_pretrained(tmp_path)
    assert str(transformers.BertModel.from_pretrained(tmp_path).dtype) == "torch.float16"
    assert peftplan.estimate(str(tmp_path), dtype="auto", seq_len=4).assumptions["dtype"] == "fp16"
    stated = (tmp_path / "config.json").read_text().replace('"dtype": "float16",', "")
    (tmp_path / "config.json").write_text(stated)
    assert str(transformers.BertModel.from_pretrained(tmp_path).dtype) == "torch.float16"
    assert checkpoint_dtype(str(tmp_path), load_config(tmp_path)) is None  # only the file with the weights tells


def test_other_tools() -> None:
    """LLaMA-Factory loads with `auto` (model/loader.py:155), ms-swift takes what config.json says (model/utils.py:247)."""
    factory = {
        "model_name_or_path": "google/gemma-2-2b",
        "stage": "sft",
        "finetuning_type": "lora",
        "template": "gemma",
        "bf16": True,
    }
    assert peftplan.estimate(config=read(factory)).assumptions["dtype"] == "fp32"
    swift = {"model": "meta-llama/Llama-2-7b-hf", "tuner_type": "lora", "max_length": 512}
    options = read(swift).options
    assert (options["dtype"], options["autocast"]) == ("fp16", "fp16")
    options = read({**swift, "model": "google/gemma-2-2b"}).options
    assert (options["dtype"], options["autocast"]) == ("fp32", "fp16")
    assert read({**swift, "model": "Qwen/Qwen2.5-0.5B"}).options["autocast"] == "bf16"
    assert read({**swift, "torch_dtype": "bfloat16"}).options["dtype"] == "bf16"
    assert read({"model_name_or_path": "gpt2", "dtype": "auto"}).options["dtype"] == "auto"  # TRL's default is float32
    assert read({"model_name_or_path": "gpt2", "per_device_train_batch_size": 1}).options["dtype"] == "fp32"


def test_a_checkpoint_of_another_run_has_no_known_dtype() -> None:
    """TinyLlama's base and its chat model have the same shapes, but are trained and saved apart."""
    base, chat = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert checkpoint_dtype(base, load_config(base)) is None
    assert checkpoint_dtype(chat, load_config(chat)) == "bf16"


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ("microsoft/Phi-3-mini-4k-instruct", "bf16"),
        ("tiiuae/falcon-7b-instruct", "bf16"),
        ("bigcode/starcoder2-15b", "fp32"),
        ("bigcode/starcoder2-15b-instruct-v0.1", None),
        ("agentica-org/DeepScaleR-1.5B-Preview", None),
        ("mistral-community/Mistral-7B-v0.2", None),
    ],
)
def test_a_dtype_of_a_copied_config_is_not_that_of_another_run(model: str, dtype: str | None) -> None:
    assert checkpoint_dtype(model, load_config(model)) == dtype
