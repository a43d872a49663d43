"""Trainers of other tools have a peak where they were rehearsed, and none elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan

FLASH = "flash_attention_2"
OVER_8: dict[str, Any] = {"gpus": 8, "batch_size": 1, "seq_len": 2048, "use_vllm": True, "num_generations": 8}
REWARD: dict[str, Any] = {"model": "qwen3-0.6b", "trainer": "llamafactory-reward", "method": "lora"}
GRPO: dict[str, Any] = {
    "model": "llama-3.2-1b",
    "trainer": "axolotl-grpo",
    "method": "full",
    "attn_implementation": FLASH,
    "seq_len": 512,
    "max_completion_length": 128,
    "beta": 0.001,
}
EMBEDDING: dict[str, Any] = {
    "model": "qwen3-0.6b",
    "trainer": "swift-embedding",
    "method": "lora",
    "attn_implementation": FLASH,
    "gpus": 2,
    "strategy": "zero2",
    "batch_size": 1,
    "seq_len": 4096,
}
SHARED: dict[str, Any] = {
    **OVER_8,
    "model": "qwen2.5-0.5b",
    "trainer": "swift-grpo-shared-rows",
    "method": "full",
    "attn_implementation": FLASH,
    "strategy": "zero3",
}
TAUGHT: dict[str, Any] = {
    **OVER_8,
    "model": "qwen3-0.6b",
    "trainer": "swift-grpo-taught",
    "teacher_model": "qwen3-32b",
    "method": "full",
    "attn_implementation": FLASH,
    "strategy": "zero2",
    "vllm_mode": "server",
}
LISA: dict[str, Any] = {"model": "llama-3.2-1b", "trainer": "axolotl", "method": "lisa", "attn_implementation": FLASH}
ALONE: dict[str, Any] = {"gpus": None, "strategy": None}
MIXTURE = {"model": "qwen3-30b-a3b"}
PLAIN: dict[str, Any] = {"gradient_checkpointing": False}
EAGER: dict[str, Any] = {"attn_implementation": "eager"}


@pytest.mark.parametrize(
    ("job", "others"),
    [
        (REWARD, [{"method": "full"}, {"method": "qlora"}, {"use_dora": True}, {"dtype": "fp32"}, PLAIN, MIXTURE]),
        (GRPO, [{"method": "lora"}, {"gpus": 2}, {"use_vllm": True}, {"model": "gemma-2-2b"}, EAGER, MIXTURE]),
        (EMBEDDING, [{"method": "full"}, {"method": "qlora"}, {"batch_size": 8}, {"model": "llama-3.2-1b"}, ALONE]),
        (SHARED, [{"use_vllm": None}, {"method": "lora"}, ALONE, PLAIN, MIXTURE]),
        (TAUGHT, [{"vllm_mode": "colocate"}, {"use_vllm": None, "vllm_mode": None}, {"method": "lora"}, ALONE]),
        (LISA, [{"optim": "lomo"}, {"trainer": "trl-dpo"}, {"trainer": "torchtune"}, {"gpus": 2}, MIXTURE]),
    ],
    ids=lambda value: value.get("trainer") if isinstance(value, dict) else "",
)
def test_peaks_are_those_that_were_rehearsed(job: dict[str, Any], others: list[dict[str, Any]]) -> None:
    rehearsed = {"gradient_checkpointing": True} | job
    assert peftplan.estimate(**rehearsed).peaks is not None
    for other in others:
        unlike = peftplan.estimate(**{name: value for name, value in (rehearsed | other).items() if value is not None})
        assert unlike.peaks is None, other
        assert unlike.trainable_parameters > 0


def test_kernels_and_mixtures_that_were_not_rehearsed_have_no_peak() -> None:
    """RMSNorm of torch was rehearsed under FSDP2 with all weights, GRPO of ms-swift under ZeRO-3 without experts."""
    norm: dict[str, Any] = {"model": "qwen2.5-0.5b", "trainer": "automodel", "kernels": "torch-norm"}
    shared: dict[str, Any] = {"strategy": "fsdp2", "gpus": 8}
    assert peftplan.estimate(**norm, **shared, method="full").peaks is not None
    assert peftplan.estimate(**norm, **shared, method="lora").peaks is None
    assert peftplan.estimate(**norm, method="full").peaks is None
    grpo = SHARED | {"trainer": "swift-grpo", "vllm_mode": "server"}
    assert peftplan.estimate(**grpo).peaks is not None
    assert peftplan.estimate(**grpo | MIXTURE).peaks is None


def test_no_format_stores_a_value_head() -> None:
    """trl adds it when the base is loaded, so that it trains beside an adapter over 4 bits, and what is quantized stays."""
    plain = peftplan.estimate("qwen3-0.6b", method="qlora", trainer="transformers")
    scored = peftplan.estimate("qwen3-0.6b", method="qlora", trainer="llamafactory-reward")
    assert scored.trainable_parameters - plain.trainable_parameters == 1024 + 1
    assert scored.assumptions["quantized_parameters"] == plain.assumptions["quantized_parameters"]


def test_reserved_bytes_of_later_turns_are_not_stated() -> None:
    """Where a step needs most they are."""
    job: dict[str, Any] = {"model": "qwen3-0.6b", "trainer": "trl-grpo", "method": "lora"}
    turns, one = (peftplan.estimate(**job, tool_turns=tool_turns).peaks for tool_turns in (True, False))
    assert turns is not None
    assert one is not None
    assert (turns.phase, turns.reserved) == ("generate", None)
    assert one.reserved is not None
    short = peftplan.estimate("smollm2-135m", trainer="trl-grpo", method="full", max_completion_length=16, tool_turns=True).peaks
    assert short is not None
    assert (short.phase, short.reserved is None) == ("backward", False)
