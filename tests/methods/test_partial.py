"""Only named parameters train: against the loops of the tools over the real model's names, and LLaMA Pro's layers by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("transformers")

import peftplan
from peftplan.errors import InputError, RefusedError
from peftplan.job.configs.read import read_values
from peftplan.methods.adaptation import Adaptation
from tests.methods import tiny


def names_of(adaptation: Adaptation) -> set[str]:
    return {f"{p.module}.{p.param}".replace("{}", str(layer)) for p in adaptation.trained for layer in p.layers or (0,)}


@pytest.mark.parametrize(
    ("model", "layers", "modules", "extra"),
    [("llama", 2, "all", ""), ("llama", -1, "all", ""), ("qwen3", 2, "self_attn,mlp", "norm"), ("gpt2", 1, "attn", "wte,ln_f")],
)
def test_llama_factory_freezes_by_parts_of_names(model: str, layers: int, modules: str, extra: str) -> None:
    """Its loop, model/adapter.py:104 and :129 of 0.9.5: `norm` is a part of every norm's name."""
    every, depth = [name for name, _ in tiny.real(model).named_parameters()], 3
    ids = range(depth - layers, depth) if layers > 0 else range(-layers)
    parts = [f".{i}.{'' if m == 'all' else m}" for m in modules.split(",") for i in ids] + [e for e in extra.split(",") if e]
    expected = {name for name in every if any(part in name for part in parts)}
    values = {"finetuning_type": "freeze", "freeze_trainable_layers": layers, "freeze_trainable_modules": modules}
    plan = read_values(
        {"model_name_or_path": "gpt2", "disable_gradient_checkpointing": True, **values, "freeze_extra_modules": extra or None},
        file="a.yaml",
        tool="llamafactory",
    )
    assert not plan.unsupported
    assert plan.options["trainable_dtype"] == "fp32"
    chosen = {name: plan.options[name] for name in ("trainable", "trainable_layers")}
    assert names_of(tiny.ours(model, "partial", **chosen)) == expected


def test_axolotl_matches_from_the_start() -> None:
    """Its loop, utils/freeze.py:75 of 0.19: a dot is a dot, and of some rows the whole weight has a gradient."""
    patterns = ["^lm_head.weight$", "model.embed_tokens.weight$[:32]", "model.layers.[1-2]+.mlp.*proj", "norm"]
    rules = [re.compile(re.sub(r"\.(?!\+)", "\\.", re.sub(r"\[[0-9]*:[0-9]*\]$", "", pattern))) for pattern in patterns]
    expected = {name for name, _ in tiny.real("llama").named_parameters() if any(rule.match(name) for rule in rules)}
    plan = read_values(
        {"base_model": "llama-3.2-1b", "unfrozen_parameters": patterns, "datasets": []}, file="a.yml", tool="axolotl"
    )
    assert plan.options["method"] == "partial"
    assert len(expected) == 2
    assert names_of(tiny.ours("llama", "partial", trainable=plan.options["trainable"])) == expected


def test_patterns_of_experts_under_their_old_name_match_nothing() -> None:
    """axolotl's example: with its transformers 5.16 the embedding and the head alone train, 2 x 32,000 x 6,144 numbers."""
    patterns = ["^lm_head.weight$", "^model.embed_tokens.weight$", "model.layers.4[4-9]+.block_sparse_moe.experts"]
    values = {"base_model": "mistral-community/Mixtral-8x22B-v0.1", "unfrozen_parameters": patterns, "datasets": []}
    plan = read_values(values, file="a.yml", tool="axolotl")
    assert "called mlp in transformers 5" in plan.assumed["trainable"]
    method = {name: plan.options[name] for name in ("method", "trainable")}
    assert peftplan.estimate(plan.model, **method).trainable_parameters == 2 * 32_000 * 6144


def test_spectrum_names_what_trains_in_a_file() -> None:
    """philschmid's file of Llama 3.1 8B: 2 tables, and matrices and norms of some layers, counted by hand from its lines."""
    path = "configs/spectrum/snr_results_meta-llama-Meta-Llama-3.1-8B_unfrozenparameters_30percent.yaml"
    values = {"model_name_or_path": "meta-llama/Llama-3.1-8B", "spectrum_config_path": path, "dtype": "bfloat16"}
    plan = read_values(values, file="a.yaml", tool="trl")
    assert not plan.unsupported
    estimate = peftplan.estimate(plan.model, **plan.options)
    h, i, kv, v = 4096, 14336, 1024, 128_256
    trainable = plan.options["trainable"]
    assert isinstance(trainable, tuple)
    ends = [name.rstrip(")").rpartition(".")[2] for name in trainable]
    sizes = {"gate_proj": h * i, "up_proj": h * i, "down_proj": h * i, "q_proj": h * h, "o_proj": h * h, "k_proj": kv * h}
    sizes |= {"v_proj": kv * h, "input_layernorm": h, "post_attention_layernorm": h}
    # `model.layers.1.` and the like also begin no other layer's name: a dot follows each number
    assert estimate.trainable_parameters == 2 * v * h + sum(sizes[end] for end in ends if end in sizes)
    unknown = read_values(values | {"spectrum_config_path": "/etc/hosts"}, file="a.yaml", tool="trl")
    assert "spectrum_config_path" in unknown.unsupported


def test_layers_belong_to_patterns_that_name_them() -> None:
    with pytest.raises(InputError, match="no parameter's name matches"):
        tiny.ours("llama", "partial", trainable=["vision"])
    with pytest.raises(InputError, match="trainable_layers belongs to patterns"):
        tiny.ours("llama", "partial", trainable=["norm"], trainable_layers=1)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        # ValueError: You cannot perform fine-tuning on purely quantized models (transformers 5.24, trainer_utils.py:131)
        ({"trainable": ["norm"], "quant": "nf4"}, "without an adapter"),
        # RuntimeError: expected m1 and m2 to have the same dtype, which meta tensors do not raise
        ({"trainable_dtype": "fp32", "autocast": "none"}, "without autocast"),
    ],
)
def test_what_raises_is_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        peftplan.estimate("llama-3.2-1b", method="partial", **options)


def test_llama_pro_adds_a_copy_behind_each_group() -> None:
    """Qwen2.5 7B with 4 new layers: 28 + 4, of which 7, 15, 23 and 31 train (swift, tuners/llamapro.py:86)."""
    estimate = peftplan.estimate("qwen2.5-7b", method="llama-pro", num_new_blocks=4)
    h, i, kv = 3584, 18944, 512
    layer = 2 * h * h + 2 * kv * h + 3 * h * i + h + 2 * kv + 2 * h
    assert estimate.trainable_parameters == 4 * layer
    assert estimate.total_parameters == 7_615_616_512 + 4 * layer
    with pytest.raises(RefusedError, match="does not divide"):
        peftplan.estimate("qwen2.5-7b", method="llama-pro", num_new_blocks=5)


def test_layers_of_lisa_take_turns() -> None:
    """Llama 2 7B: 4 of 32 layers, both tables of 32,000 rows of 4,096 and the final norm have gradients in 16 bits; all weights
    count, and have a byte twice in 8 bits, their blocks' scales aside."""
    job: dict[str, Any] = {"trainer": "transformers", "dtype": "bf16", "optim": "adamw_8bit", "gradient_accumulation_steps": 2}
    full, lisa = (peftplan.estimate("llama-2-7b", method=method, **job) for method in ("full", "lisa"))
    more = peftplan.estimate("llama-2-7b", method="lisa", n_layers=4, **job)
    assert lisa.trainable_parameters == full.trainable_parameters == 6_738_415_616
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    sums = [estimate.ledger.by_category() for estimate in (full, lisa, more)]
    assert sums[2]["gradients"] == 2 * (4 * layer + 2 * 32_000 * 4096 + 4096)
    assert sums[2]["gradients"] - sums[1]["gradients"] == 2 * 2 * layer
    assert len({each["optimizer_states"] for each in sums}) == 1
    whole = peftplan.estimate("llama-2-7b", method="lisa", n_layers=32, **job)
    assert whole.peaks is not None
    assert full.peaks is not None
    assert whole.peaks.by_phase == full.peaks.by_phase


def test_layers_take_turns_on_one_gpu_in_formulas() -> None:
    assert "layers that take turns" in peftplan.estimate("qwen2.5-7b", method="lisa", gpus=2, strategy="ddp").not_modelled[0]
    with pytest.raises(RefusedError, match="method lisa"):
        peftplan.estimate("smollm2-135m", method="lisa", engine="trace")
    with pytest.raises(RefusedError, match="more than the model's 30 layers"):
        peftplan.estimate("smollm2-135m", method="lisa", n_layers=31)
