"""LoRA over weights that gptqmodel packed: programs of transformers, TRL or torch alone on the emulated card (packed.jsonl).

Each loads with `backend="auto_trainable"`, and without a compiler of CUDA (`tools/programs/job.py`, `packed`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
from peftplan.errors import NoEngineError
from peftplan.job.sources import load_config
from tools import rehearsed_llamafactory, rehearsed_swift
from tools.rehearsed_jobs import drifts, read

RESERVED = {"ddp": 0.2, "zero1": 0.2, "zero2": 0.22, "fsdp2": 1.3}
"""Strategy → percent that reserved bytes may be apart, of models of 0.1 to 1.2 GB."""
ROWS = read(Path(__file__).with_name("packed.jsonl"))
BY_TOOLS = read(Path(__file__).with_name("packed_by_tools.jsonl"))
"""ms-swift 4.6 and LLaMA-Factory 0.9.5 with a repository whose config.json names the backend."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["job"]))
def test_formulas_hold_what_gptqmodel_holds(row: dict[str, Any]) -> None:
    """A rehearsal's peak is that of all steps: of a small job the 256 MiB with which the first step times gptq's kernels, which
    our reserved bytes alone have. 0.13 % of a step are 0.2 MB of SmolLM2's. Under DDP, of which SmolLM2 with awq reserves 2 MiB
    more, the packed weights of TinyLlama and Llama 3.2 are sent before the first forward of each step, beside which little is
    there. Under FSDP2 0.2 MB of tails lie in other blocks."""
    drift = drifts(row, "analytic")
    assert drift is not None
    assert abs(drift["backward"]) < (0.003 if "fsdp2" in row["job"] else 0.002)
    assert max(abs(drift[phase]) for phase in ("load", "forward")) < (0.1 if "fsdp2" in row["job"] else 0.05)
    assert abs(drift["step"]) < (0.16 if "fsdp2" in row["job"] else 0.13)
    assert abs(drift["reserved"]) < RESERVED.get(row["job"].partition("--strategy ")[2].split(" ")[0], 0.01)
    assert row["allocated"] == max(row["by_phase"].values()) or "gptq" in row["job"]


@pytest.mark.parametrize("row", BY_TOOLS, ids=lambda row: " ".join(map(str, row["values"].values())))
def test_formulas_hold_what_tools_hold_of_packed_weights(row: dict[str, Any]) -> None:
    """Without the backend both end in an error, which the plan says. Neither casts norms and tables to fp32. Under DDP 0.01 % of
    allocated bytes are 0.6 MB, and 0.3 % of reserved ones 19 MB."""
    tool = rehearsed_swift if "model" in row["values"] else rehearsed_llamafactory
    (change,) = tool.plan(row).refusals().values()
    assert change == "with quantization_config.backend of the repository's config.json: auto_trainable"
    assert not tool.plan(row).unsupported
    peaks = peftplan.estimate(**tool.options(row)).peaks
    assert peaks is not None
    for phase, nbytes in peaks.by_phase.items():
        assert nbytes == pytest.approx(row["by_phase"][phase], rel=2e-4)
    assert peaks.allocated == pytest.approx(row["allocated"], rel=1e-4)
    assert peaks.reserved == pytest.approx(row["reserved"], rel=3e-3 if "gpus" in row else 1e-6)


def test_gptq_keeps_dequantized_weights_until_backward() -> None:
    """Without checkpoints, beside what the same base in 16 bits keeps: of 32 layers 4 × 4096² + 3 × 4096 × 11008 numbers of
    2 bytes, but for the first layer's q, k and v, whose input asks for no gradient."""
    options: dict[str, Any] = {"method": "lora", "gradient_checkpointing": False, "seq_len": 256, "device_map": "cuda"}
    packed, dense = (
        peftplan.estimate("llama-2-7b", quant=quant, **options).to_dict()["memory"]["by_category"]["activations"]
        for quant in ("gptq", "none")
    )
    assert packed - dense == 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) - 3 * 4096**2)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("qwen2.5-0.5b", {"quant": "gptq", "quant_bits": 3}),
        ("qwen2.5-0.5b", {"quant": "awq", "seq_len": 128}),
        ("qwen2.5-0.5b", {"quant": "awq", "method": "dora"}),
        ("qwen2.5-0.5b", {"quant": "gptq", "strategy": "zero3", "gpus": 2}),
        ("opt-125m", {"quant": "awq", "strategy": "zero1", "gpus": 8}),
        ("opt-125m", {"quant": "gptq", "strategy": "fsdp2", "gpus": 8}),
        ("qwen2.5-0.5b", {"quant": "gptq", "strategy": "fsdp2", "gpus": 8, "gradient_checkpointing": False}),
        ("qwen2.5-0.5b", {"quant": "gptq", "strategy": "fsdp2", "gpus": 2, "offload_params": "cpu"}),
        ("pythia-160m", {"quant": "awq"}),
        ("olmoe-1b-7b-0924", {"quant": "gptq"}),
        ("qwen2.5-0.5b", {"quant": "gptq", "bias": "lora_only"}),
    ],
)
def test_what_was_not_rehearsed_has_no_peak(model: str, options: dict[str, Any]) -> None:
    """Fused products, activations that awq scales, other adapters and ranks, experts."""
    result = peftplan.estimate(model, **{"method": "lora", "seq_len": 256, **options})
    assert result.peaks is None
    assert "gptq" in result.not_modelled[0]


def test_sizes_without_a_formula_beside_others() -> None:
    """awq's fused products, in a sweep and at arrays of sizes."""
    options: dict[str, Any] = {"method": "lora", "quant": "awq", "target_modules": "q_proj"}
    rows = list(peftplan.sweep("qwen2.5-0.5b", **options, batch_size=[1, 2], seq_len=[128, 64, 256]))
    known = {(row["batch_size"], row["seq_len"]) for row in rows if row["peak_allocated"] is not None}
    assert known == {(1, 256), (2, 128), (2, 256)}
    with pytest.raises(NoEngineError, match="above 128 tokens"):
        peftplan.estimate("qwen2.5-0.5b", **options, seq_len=256).at(seq_len=[256, 64])


def test_what_gptqmodel_keeps_as_buffers_does_not_train() -> None:
    """Biases of packed layers: of Qwen 2.5's attention none is left, of OPT's 12 layers those of two norms, and the last's."""
    options: dict[str, Any] = {"method": "lora", "quant": "gptq", "seq_len": 256, "target_modules": "q_proj"}
    ours, plain = (peftplan.estimate("qwen2.5-0.5b", **options, bias=bias).trainable_parameters for bias in ("all", "none"))
    assert ours == plain
    ours, plain = (peftplan.estimate("opt-125m", **options, bias=bias).trainable_parameters for bias in ("all", "none"))
    assert ours - plain == (2 * 12 + 1) * 768


def test_a_trainable_copy_of_a_packed_layer_names_what_helps() -> None:
    with pytest.raises(peftplan.RefusedError, match="cannot train; use --quant none"):
        peftplan.estimate("qwen2.5-0.5b", method="lora", quant="gptq", target_modules="v_proj", modules_to_save="q_proj")


def test_transformers_does_not_load_gpt2_packed() -> None:
    """Rehearsed: `'_LinearWeightMetadata' object has no attribute 'normal_'`."""
    result = peftplan.estimate("gpt2", method="lora", quant="gptq", target_modules="c_attn", seq_len=256)
    assert "AttributeError" in result.not_modelled[0]


@pytest.mark.parametrize("tool", ["trl", "ms-swift", "trl-script", "llamafactory", "axolotl"])
@pytest.mark.parametrize("quant", ["gptq", "awq"])
def test_no_file_of_a_tool_quantizes_so(tool: Any, quant: str) -> None:
    """`bnb_4bit_quant_type` is bitsandbytes', which has nf4 and fp4 alone."""
    result = peftplan.estimate("qwen2.5-0.5b", method="lora", quant=quant, target_modules=["q_proj", "v_proj"], seq_len=256)
    with pytest.raises(peftplan.RefusedError, match=r"quant: .* no setting for"):
        peftplan.export(result, to=tool)


@pytest.mark.parametrize(
    ("quant_method", "field", "value"),
    [
        ("gptq", "dynamic", {"-:.*down.*": {}}),
        ("gptq", "checkpoint_format", "marlin"),
        ("gptq", "lm_head", True),
        ("awq", "version", "gemv_fast"),
    ],
)
def test_layers_that_a_repository_packs_otherwise_are_not_counted(quant_method: str, field: str, value: object) -> None:
    config = {**load_config("qwen2.5-0.5b"), "quantization_config": {"quant_method": quant_method, field: value}}
    with pytest.raises(peftplan.InputError, match=rf"quantization_config\.{field}"):
        peftplan.estimate(config, method="lora", target_modules="q_proj")


def test_what_an_awq_repository_leaves_in_16_bits() -> None:
    """Of 24 layers, a weight of 896 × 4864, of which 4 bits were a number, 2 bytes a scale, and half a byte a zero, in blocks of
    512 bytes."""
    stored = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "modules_to_not_convert": ["down_proj"]}
    config = {**load_config("qwen2.5-0.5b"), "quantization_config": stored}
    options: dict[str, Any] = {"method": "lora", "target_modules": "q_proj", "kbit_prepare": False, "seq_len": 256}
    ours = peftplan.estimate(config, **options).to_dict()["memory"]["persistent"]
    all_packed = peftplan.estimate("qwen2.5-0.5b", quant="awq", **options).to_dict()["memory"]["persistent"]
    assert ours - all_packed == 24 * 896 * 4864 * 2 - 24 * (896 * 4864 // 2 + 896 * 38 * 2 + 34 * 512)
