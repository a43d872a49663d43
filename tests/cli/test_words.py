"""Words of other tools: accepted on the command line and as keywords, each option once, errors under the name that was typed."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

import peftplan
from peftplan.distributed.strategy import Distributed
from peftplan.job.setup import Setup
from peftplan.job.words import MEANINGS, REFUSED
from peftplan.methods import METHODS, config_class
from tests.cli.run import run


def assumed_by(*args: str) -> dict[str, Any]:
    """What an estimate of a small model by the command line assumes, with its method and count."""
    done = run("estimate", "gpt2", *args, "--format", "json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    return result["assumptions"] | {"method": result["method"]["name"], "trainable": result["trainable_parameters"]}


def test_a_word_is_no_field_of_any_method_and_means_an_option() -> None:
    """peft's own fields keep their meaning, those of methods that only peft counts included."""
    peft = pytest.importorskip("peft")
    of_peft = {field.name for cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.values() for field in fields(cls)}
    of_methods = {name for method in METHODS.values() for name in config_class(method).model_fields}
    described = {"task_type", "peft_type"}  # what a config says of itself; given as a keyword it names the method
    taken = (of_peft | of_methods | set(Setup.model_fields)) - described
    assert taken.isdisjoint(MEANINGS.keys() | REFUSED.keys())
    options = {meaning.option for meaning in MEANINGS.values()}
    assert options <= set(Setup.model_fields) | set(Distributed.model_fields) | of_methods | {"method"}


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        (["--lora-rank", "4"], ["--r", "4"]),
        (["--lora_r=4"], ["--r", "4"]),
        (["--rank", "4", "--max-length", "128"], ["--r", "4", "--seq-len", "128"]),
        (["--cutoff_len", "128", "--micro-batch-size", "3"], ["--seq-len", "128", "--batch-size", "3"]),
        (["--per_device_train_batch_size", "3", "--max-seq-length", "64"], ["--batch-size", "3", "--seq-len", "64"]),
        (["--bs", "3", "--load-in-4bit"], ["--batch-size", "3", "--quant", "nf4"]),
        (["--load_in_8bit", "True"], ["--quant", "int8"]),
        (["--load-in-8bit", "false"], []),
        (["--quantization-bit", "4", "--double-quantization"], ["--quant", "nf4", "--double-quant"]),
        (["--flash-attn"], ["--attn-implementation", "flash_attention_2"]),
        (["--flash_attn", "fa2"], ["--attn-implementation", "flash_attention_2"]),
        (["--flash-attn", "disabled"], ["--attn-implementation", "eager"]),
        (["--gradient_checkpointing", "False"], ["--no-gradient-checkpointing"]),
        (["--use-gradient-checkpointing"], ["--gradient-checkpointing"]),
        (["--finetuning-type", "full", "--bf16"], ["--method", "full", "--autocast", "bf16"]),
        (["--lora-target", "all", "--optimizer", "adamw_torch"], ["--target-modules", "all-linear", "--optim", "adamw_torch"]),
        (["--packing", "False", "--use_liger_kernel", "False"], []),
        (["--neftune-noise-alpha", "5"], ["--noisy-embeddings"]),
        (["--neftune-noise-alpha", "0"], ["--noisy-embeddings"]),  # transformers: `is not None`
        (["--quantization", "4bit"], ["--quant", "nf4"]),
        (["--nproc", "2", "--zero-stage", "2"], ["--gpus", "2", "--strategy", "zero2"]),
        (["--world-size", "2"], ["--gpus", "2"]),
        (
            ["--num-processes", "4", "--tp", "2", "--strategy", "fsdp2", "--lora-target", "c_attn", "--trainer", "automodel"],
            ["--gpus", "4", "--tp-size", "2", "--strategy", "fsdp2", "--target-modules", "c_attn", "--trainer", "automodel"],
        ),
    ],
)
def test_a_word_is_what_it_means(typed: list[str], ours: list[str]) -> None:
    assert assumed_by(*typed) == assumed_by(*ours)


def test_a_switch_does_not_swallow_the_model() -> None:
    assert run("estimate", "--load-in-4bit", "gpt2") == run("estimate", "--quant", "nf4", "gpt2")


@pytest.mark.parametrize(
    ("keywords", "ours"),
    [
        ({"lora_rank": 4}, {"r": 4}),
        ({"load_in_4bit": True, "max_length": 128}, {"quant": "nf4", "seq_len": 128}),
        ({"load_in_4bit": False, "packing": False, "lora_rank": None}, {}),
        ({"adapter": "dora", "flash_attention": True}, {"method": "dora", "attn_implementation": "flash_attention_2"}),
    ],
)
def test_keywords_are_the_same_words(keywords: dict[str, Any], ours: dict[str, Any]) -> None:
    one, other = (peftplan.estimate("gpt2", **options) for options in (keywords, ours))
    assert (one.assumptions, one.trainable_parameters) == (other.assumptions, other.trainable_parameters)


def test_serving_reads_them_too() -> None:
    assert peftplan.serving("gpt2", bs=4, max_length=64).to_dict() == peftplan.serving("gpt2", batch_size=4, seq_len=64).to_dict()


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("--method lora --method dora", "--method is given twice"),
        ("--r 4 --r=4", "--r is given twice"),
        ("--rank 3 --lora-r 4", "--rank and --lora-r set the same option: give one"),
        ("--load-in-4bit --quant int8", "--load-in-4bit and --quant set the same option: give one"),
        ("--double-quant --no-double-quant", "--double-quant and --no-double-quant set the same option: give one"),
        ("--r 4 --set lora_rank=8", "--r and --set lora_rank set the same option: give one"),
        ("--set r=4 --set r=8", "--set r is given twice"),
        ("--format json --format csv", "--format is given twice"),
        ("--packing",
         "--packing: name a trainer that packs: trl-packed, swift-dpo-packed or swift-generative-reranker-packed "
         "(trl with FlashAttention); the batch size is 1, and the sequence length that of all its rows"),
        ("--world-size 4 --nodes 2",
         "--world-size counts the ranks of all nodes; beside a number of nodes say how many GPUs each has: gpus"),
        ("--zero-stage 4 --gpus 2",
         "--zero-stage: '4' is not valid; accepted: ddp, device-map, fsdp1, fsdp2, tp, zero0, zero1, zero2, zero3"),
        ("--model-name-or-path gpt2",
         "--model-name-or-path: the model is the first argument: peftplan estimate MODEL, peftplan.estimate(MODEL)"),
        ("--learning-rate 1e-4", "--learning-rate: it does not change memory: leave it out"),
        ("--warmup-ratio=0.1", "--warmup-ratio: it does not change memory: leave it out"),
        ("--set num_train_epochs=3", "--set num_train_epochs: it does not change memory: leave it out"),
        ("--eval-steps 3", "no such option: --eval-steps (see --help)"),
        ("--deepspeed ds.json", "--deepspeed: cannot read 'ds.json': No such file or directory"),
        ("--r 0", "--r must be at least 1 (got 0)"),
        ("--lora_rank 0", "--lora_rank must be at least 1 (got 0)"),
        ("--bs many", "--bs must be a whole number (got 'many')"),
        ("--set rank=0", "--set rank must be at least 1 (got 0)"),
        ("--flash-attn=x", "--flash-attn: 'x' is not valid; accepted: true, false, fa2, sdpa, disabled, auto"),
        ("--quant nf4 --method full",
         "--quant: a base stored as nf4 cannot be trained in full; use a PEFT method or --quant none"),
        ("--no-gradient-checkpointing --every-n-layers 2",
         "--every-n-layers: 2 is not valid; accepted: 1, or more with --gradient-checkpointing"),
    ],
)  # fmt: skip
def test_an_error_names_what_was_typed(command: str, line: str) -> None:
    done = run("estimate", "gpt2", *command.split())
    assert (done.code, done.out, done.err) == (2, "", f"peftplan: {line}\n")


@pytest.mark.parametrize("typed", ["--gpus 7", "--gpu 7xl4"])
def test_tensor_parallelism_names_what_says_how_many_gpus_there_are(typed: str) -> None:
    done = run("estimate", "llama-3.2-1b", *typed.split(), "--strategy", "tp")
    accepted = "strategy tp divides matrices by 7; accepted: a divisor of the model's 32 attention heads"
    assert done.err == f"peftplan: {typed.split()[0]}: 7 is not valid; {accepted}\n"


def test_repeatable_options_and_switches_may_be_repeated() -> None:
    assert assumed_by("--gpu", "t4", "--gpu", "l4", "--set", "bias=all", "--set", "use_dora=false", "--strict", "--strict")


def test_an_error_of_python_names_the_keyword() -> None:
    with pytest.raises(peftplan.InputError, match=r"^r must be at least 1 \(got 0\)$"):
        peftplan.estimate("gpt2", r=0)
    with pytest.raises(peftplan.InputError, match=r"^lora_rank must be at least 1 \(got 0\)$"):
        peftplan.estimate("gpt2", lora_rank=0)
    of_trainer: dict[str, Any] = {"learning_rate": 1e-4}
    with pytest.raises(peftplan.PeftplanError, match=r"^learning_rate: it does not change memory: leave it out$"):
        peftplan.estimate("gpt2", **of_trainer)
    with pytest.raises(peftplan.PeftplanError, match=r"^world_size counts the ranks of all nodes"):
        peftplan.estimate("gpt2", world_size=4, nodes=2)
    with pytest.raises(peftplan.PeftplanError, match=r"^lora_rank and r set the same option: give one$"):
        peftplan.estimate("gpt2", lora_rank=4, r=4)
    with pytest.raises(peftplan.PeftplanError, match=r"^packing: name a trainer that packs: trl-packed"):
        peftplan.estimate("gpt2", packing=True)


def test_words_are_not_in_the_help() -> None:
    text = run("estimate", "--help-all").out
    assert [word for word in MEANINGS if f"--{word.replace('_', '-')} " in text] == []
    assert "VALUE  " not in text.replace("FIELD=VALUE", "").replace("KEY=VALUE", "")
