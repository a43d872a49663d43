"""Stacks of experts that bitsandbytes stores, and layers in int8, against `axolotl train` on the emulated card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.errors import OptionError, RefusedError
from peftplan.job.configs.read import read_values
from peftplan.job.script import Script
from tools.rehearsed_axolotl import options, plan
from tools.rehearsed_jobs import read

ROWS = read(Path(__file__).with_name("stacks.jsonl"))
LARGEST = {"allocated": 0.06, "reserved": 1.2}
"""Per cent; reserved: Llama in int8, all others 0.2."""
GLM: dict[str, Any] = {"base_model": "zai-org/GLM-4.7-Flash", "adapter": "lora", "load_in_8bit": True, "lora_r": 8}
GLM |= {"lora_target_modules": ["o_proj"], "gradient_checkpointing": True, "attn_implementation": "flash_attention_2"}


def _named(row: dict[str, Any]) -> str:
    return f"{row['values']['base_model']}-{row['values']['adapter']}-{row['layers']}"


@pytest.mark.parametrize("row", ROWS, ids=_named)
def test_formulas_hold_what_axolotl_holds(row: dict[str, Any]) -> None:
    """The checkpoint has the matrices of each expert, which become one weight as they are loaded."""
    assert not plan(row).unsupported
    peaks = peftplan.estimate(**options(row)).peaks
    assert peaks is not None
    drift = {phase: 100 * (peaks.by_phase[phase] / kept - 1) for phase, kept in row["by_phase"].items()}
    assert {phase: number for phase, number in drift.items() if abs(number) > LARGEST["allocated"]} == {}
    assert abs(100 * (peaks.reserved / row["reserved"] - 1)) < LARGEST["reserved"]


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_stack_is_one_weight(quant: str) -> None:
    """Mixtral, 8 experts: gate_up (8, 28672, 4096), n = 939,524,096, and down (8, 4096, 14336), n = 469,762,048; 32 layers.

    nf4: n/2 bytes, 64 bytes of the table, 4 n/64 of absmax. int8: n bytes, 4 bytes of each row: 8 * 28672 and 8 * 4096.
    """
    job: dict[str, Any] = {"method": "lora", "r": 8, "target_modules": ["q_proj"], "quant": quant, "kbit_prepare": False}
    job |= {"seq_len": 64, "double_quant": False if quant == "nf4" else None}
    dense, stored = (peftplan.estimate("mixtral-8x7b-v0.1", quant_experts=on, **job).persistent_bytes for on in (False, True))
    elements = (939_524_096, 469_762_048)
    of_nf4 = sum(n // 2 + 512 + 4 * (n // 64) for n in elements)
    of_int8 = sum(elements) + 4 * 8 * (28_672 + 4_096)
    assert dense - stored == 32 * (2 * sum(elements) - (of_nf4 if quant == "nf4" else of_int8))


def test_the_peft_of_axolotl_0_19_makes_whole_updates() -> None:
    """QLoRA of four layers of Qwen 3 Next, 2 × 1,024 tokens, rehearsed: 3.1 GB above peft 0.21's sums of factors, as much as both
    stacks of a layer, 512 × (1024 × 2048 + 2048 × 512) × 2 B."""
    job: dict[str, Any] = {"method": "lora", "r": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"], "lora_dropout": 0.0}
    with_factors = peftplan.estimate("qwen3-30b-a3b", trainer="axolotl", **job)
    with_updates = peftplan.estimate("qwen3-30b-a3b", trainer="axolotl", tool_version="0.19", **job)
    assert with_factors.peaks is not None
    assert with_updates.peaks is None
    assert "LoRA on parameters with the peft" in with_updates.not_modelled[0]


def test_stacks_beside_a_quantized_base_are_said_to_be_wide() -> None:
    """Two layers of OLMoE with QLoRA by axolotl 0.21.0, rehearsed: load of 3.92 GB, not 2.05."""
    job: dict[str, Any] = {"method": "qlora", "target_modules": ["q_proj", "v_proj"]}
    for others, is_bound in (
        ({"trainer": "axolotl"}, True),
        ({"trainer": "transformers"}, False),
        ({"trainer": "axolotl", "quant_experts": True}, False),
    ):
        warnings = peftplan.estimate("olmoe-1b-7b-0924", **job, **others).warnings
        assert any("stacks of experts in fp32" in text for text in warnings) is is_bound


def test_no_other_format_stores_them() -> None:
    with pytest.raises(OptionError, match="quant_experts"):
        peftplan.estimate("mixtral-8x7b-v0.1", method="lora", quant_experts=True)
    with pytest.raises(RefusedError, match="trace leaves stacks of experts"):
        peftplan.estimate("mixtral-8x7b-v0.1", method="qlora", quant_experts=True, engine="trace")


def test_non_reentrant_checkpoints_leave_stacks_in_8_bits_restored() -> None:
    job: dict[str, Any] = {"method": "lora", "quant": "int8", "quant_experts": True, "gradient_checkpointing": True}
    job |= {"target_modules": ["q_proj"]}
    assert peftplan.estimate("mixtral-8x7b-v0.1", use_reentrant=True, **job).peaks is not None
    assert peftplan.estimate("mixtral-8x7b-v0.1", **job).peaks is None


def test_bitsandbytes_refuses_latent_keys_in_8_bits() -> None:
    """`axolotl train` ended with `Only two or three dimensional matrices are supported for argument A`."""
    refused = read_values(GLM, file="a.yml")
    assert "raises ValueError" in refused.refused["load_in_8bit"].why
    job: dict[str, Any] = {"method": "lora", "quant": "int8", "target_modules": ["o_proj"], "kbit_prepare": False}
    assert "four dimensions" in peftplan.estimate("glm-4.7-flash", **job).not_modelled[0]
    assert peftplan.estimate("glm-4.7-flash", quant_skip_modules=["kv_b_proj", "lm_head"], **job).peaks is not None
    assert peftplan.estimate("glm-4.7-flash", script=Script(transformers="5.14"), **job).peaks is not None


@pytest.mark.parametrize(
    ("values", "reentrant"),
    [
        ({}, True),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, False),
        ({"rl": "dpo"}, None),
        ({"gradient_checkpointing": False}, None),
    ],
)
def test_axolotl_0_19_makes_reentrant_checkpoints(values: dict[str, Any], reentrant: bool | None) -> None:
    """axolotl 0.19.0, utils/config/__init__.py:401."""
    config: dict[str, Any] = {"base_model": "Qwen/Qwen2.5-0.5B", "adapter": "lora", "gradient_checkpointing": True}
    plan = read_values({**config, **values}, file="a.yml", tool_version="0.19")
    assert plan.options.get("use_reentrant") is reentrant


def test_adapters_of_such_stacks_have_no_peak() -> None:
    wrapped = {**GLM, "quantize_moe_experts": True, "lora_target_parameters": ["mlp.experts.gate_up_proj"]}
    assert "quantize_moe_experts" in read_values(wrapped, file="a.yml").unsupported
    job: dict[str, Any] = {"method": "qlora", "quant_experts": True, "target_parameters": ["mlp.experts.gate_up_proj"]}
    assert "LoRA on a stack of experts" in peftplan.estimate("mixtral-8x7b-v0.1", **job).not_modelled[0]
