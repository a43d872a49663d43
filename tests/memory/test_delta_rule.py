"""Gated delta rules in torch's operations: against the trace, phase by phase, and against rehearsed programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan import estimate
from peftplan.memory.delta_rule import CHUNK
from tests.memory.test_convolutions import phases
from tools.rehearsed_jobs import compared, engines, read

IN_TURN = ["linear_attention", "linear_attention", "full_attention"]
DENSE: dict[str, Any] = {
    "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2000,
    "linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 48,
    "layer_types": IN_TURN, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2]},
}  # fmt: skip
EVEN = DENSE | {"linear_num_key_heads": 8, "linear_conv_kernel_dim": 3}
DEEP = DENSE | {"num_hidden_layers": 9, "layer_types": IN_TURN * 3}
MIXTURE = {name: value for name, value in DENSE.items() if name != "intermediate_size"} | {
    "model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 96, "shared_expert_intermediate_size": 160,
}  # fmt: skip
ON, OFF = {"gradient_checkpointing": True}, {"gradient_checkpointing": False, "use_cache": False}
TOLERANCE = 0.0001
"""Small integers that only the trace has."""


def with_tower(text: dict[str, Any]) -> dict[str, Any]:
    """The vision-language model of which this is the text part."""
    model_type = str(text["model_type"]).removesuffix("_text")
    vision = {
        "model_type": model_type, "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "patch_size": 16,
        "out_hidden_size": text["hidden_size"], "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 256,
    }  # fmt: skip
    stem = "Qwen3_5Moe" if "moe" in model_type else "Qwen3_5"
    return {
        "model_type": model_type, "architectures": [f"{stem}ForConditionalGeneration"], "text_config": text,
        "vision_config": vision, "tie_word_embeddings": True,
    }  # fmt: skip


IN_TEXT = {"target_modules": r".*language_model.*_proj"}
LORA, QLORA, FULL = ({"method": method} for method in ("lora", "qlora", "full"))
LOOP, TRAINER, TRL = ({"trainer": trainer} for trainer in ("plain", "transformers", "trl"))
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": (DENSE, {**LORA, **LOOP, **OFF, "batch_size": 3, "seq_len": 150}),
    "LoRA, as many heads": (EVEN, {**LORA, **TRAINER, **OFF, "batch_size": 2, "seq_len": 200}),
    "LoRA of attention": (DENSE, {**LORA, "target_modules": ["q_proj"], **LOOP, **OFF, "batch_size": 1, "seq_len": 128}),
    "LoRA, checkpoints": (DEEP, {**LORA, **TRAINER, **ON, "batch_size": 2, "seq_len": 200}),
    "LoRA, reentrant": (DENSE, {**LORA, **TRAINER, "use_reentrant": True, "batch_size": 2, "seq_len": 65}),
    "QLoRA": (DEEP, {**QLORA, **TRL, **OFF, "batch_size": 1, "seq_len": 130}),
    "full": (DEEP, {**FULL, **LOOP, **ON, "batch_size": 2, "seq_len": 60}),
    "full, autocast": (DENSE, {**FULL, **TRAINER, "dtype": "fp32", **OFF, "batch_size": 2, "seq_len": 100}),
    "experts": (MIXTURE, {**FULL, **TRL, **ON, "batch_size": 2, "seq_len": 130}),
    "text part": (with_tower(DENSE), {**LORA, **IN_TEXT, **TRAINER, **ON, "batch_size": 2, "seq_len": 200}),
    "text part, adapters in the tower too": (with_tower(DENSE), {**LORA, **TRAINER, "batch_size": 1, "seq_len": 70}),
    "text part, all weights": (
        {**with_tower(DENSE), "tie_word_embeddings": False},
        {**FULL, **TRAINER, "batch_size": 1, "seq_len": 70},
    ),
    "text part, experts": (with_tower(MIXTURE), {**QLORA, **IN_TEXT, **TRL, "batch_size": 2, "seq_len": 192}),
}


@pytest.mark.parametrize("job", JOBS)
def test_against_the_trace(job: str) -> None:
    config, options = JOBS[job]
    assert phases(config, "analytic", options) == pytest.approx(phases(config, "trace", options), rel=TOLERANCE)


def test_a_text_part_is_called_one() -> None:
    config, options = JOBS["text part"]
    assert estimate(config, gpu="a100-80gb", **options).gpus[0].to_dict()["scope"] == "text"


@pytest.mark.parametrize("tokens", [CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1])
def test_each_number_of_chunks_is_a_step_of_its_own(tokens: int) -> None:
    """One compiled for another length has another loop."""
    config, options = JOBS["LoRA"]
    assert phases(config, "analytic", {**options, "seq_len": CHUNK})
    at_length = {**options, "seq_len": tokens}
    assert phases(config, "analytic", at_length) == pytest.approx(phases(config, "trace", at_length), rel=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [{"padding": True}, {**OFF, "use_cache": True}, {"attn_implementation": "eager"}, {"dtype": "fp32"}],
    ids=str,
)  # fmt: skip
def test_what_was_not_compared_has_no_formula(options: dict[str, Any]) -> None:
    estimated = estimate(DENSE, **LORA, **LOOP, **{**ON, **options})
    assert estimated.peaks is None
    assert "delta rule" in str(estimated.not_modelled)


BY_SWIFT: dict[str, Any] = {"trainer": "swift-text-part", "batch_size": 2, "seq_len": 200}


@pytest.mark.parametrize(
    "options",
    [FULL, {**LORA, **IN_TEXT, "strategy": "zero1", "gpus": 2}, {**LORA, **IN_TEXT, "strategy": "zero3", "gpus": 2}],
    ids=str,
)  # fmt: skip
def test_beside_a_tower_that_a_tool_shows_a_picture_lora_alone_has_a_formula(options: dict[str, Any]) -> None:
    """On one GPU, under DDP and under ZeRO-2, as was rehearsed (tests/rehearse/swift.jsonl)."""
    config = {**with_tower(DENSE), "tie_word_embeddings": False}
    assert estimate(config, **LORA, **IN_TEXT, **BY_SWIFT).peaks is not None
    estimated = estimate(config, **options, **BY_SWIFT)
    assert estimated.peaks is None
    assert "(no formula yet)" in str(estimated.not_modelled)


def drifts(name: str) -> dict[str, dict[str, float]]:
    """Job → the drift of the formulas from what a program held."""
    rows = read(Path(__file__).parents[1] / "rehearse" / name)
    each = {row["job"]: drift for engine, row, drift in compared(rows, engines(rows)) if engine == "analytic" and drift}
    assert len(each) == len(rows)
    return each


def test_as_programs() -> None:
    """Rehearsed, to 0.26 %; in a plain loop 0.53 % are tails of blocks, which a trace leaves out too. A base in 4 bits that peft
    prepared has no reserved bytes."""
    for job, drift in drifts("delta_rules.jsonl").items():
        assert abs(drift["allocated"]) <= (0.6 if "plain" in job else 0.3)
        assert ("reserved" not in drift) is ("transformers --method qlora" in job)
        assert abs(drift.get("reserved", 0)) <= 0.7


def test_as_programs_on_ranks() -> None:
    """Rehearsed under DDP, FSDP2 and ZeRO. QLoRA by SFTTrainer has 1.3 % in tails of blocks, on one GPU too, as a trace has;
    Qwen 3 Next in full under FSDP2 0.4 % in forward and in the step, 1 MB, and 0.11 % at its peak. ZeRO-1 reserves 0.07 % more.
    """
    for job, drift in drifts("delta_ranks.jsonl").items():
        limit = 1.3 if "trl --method qlora" in job else 0.4 if "qwen3-next" in job else 0.3
        assert max(abs(drift[phase]) for phase in ("allocated", "load", "forward", "backward", "step")) <= limit
        assert ("reserved" not in drift) is ("fsdp2" in job and ("qlora" in job or "qwen3-next" in job))
        assert abs(drift.get("reserved", 0)) <= (0.07 if "zero1" in job else 0.01)
