"""A step of trainers that compare completions: rows, forwards and the reference model, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.errors import InputError, RefusedError
from peftplan.memory.reference_load import warm_up
from tests.memory.engines import LLAMA

MODEL = {**LLAMA, "vocab_size": 32_000, "num_hidden_layers": 3}
S, C = 256, 100
DPO: dict[str, Any] = {"trainer": "trl-dpo", "batch_size": 2, "seq_len": S}


def peak(**options: Any) -> int:
    peaks = estimate(MODEL, **{**DPO, **options}).peaks
    assert peaks is not None
    return peaks.allocated


def lines(phase: str, **options: Any) -> dict[str, int]:
    peaks = estimate(MODEL, **{**DPO, **options}).peaks
    assert peaks is not None
    by_name: dict[str, int] = {}
    for line in peaks.ledgers[phase]:
        by_name[line.name] = by_name.get(line.name, 0) + line.bytes()
    return by_name


def test_a_pair_is_two_rows() -> None:
    """Two pairs: 4 rows of int64."""
    assert lines("backward", method="lora")["input_ids"] == 8 * 4 * S
    assert lines("backward", method="lora", trainer="trl-kto")["input_ids"] == 8 * 2 * S


def test_only_completions_are_scored() -> None:
    """Hidden states and labels of 4 x 100 tokens, once for the policy and once for the reference; else of every label."""
    for options, scored in (({"max_completion_length": C}, 4 * C), ({}, 4 * (S - 1))):
        by_name = lines("forward", method="full", **options)
        assert by_name["index"] == 2 * (2 * scored * 256 + -(-8 * scored // 512) * 512)


def test_a_full_run_holds_a_second_model() -> None:
    with_copy = estimate(MODEL, method="full", **DPO)
    without = estimate(MODEL, method="full", precompute_ref_log_probs=True, **DPO)
    copied = [line for line in with_copy.static if line.name.startswith("reference model: ")]
    weights = sum(line.bytes() for line in without.static if line.category in ("weights", "buffers"))
    assert sum(line.bytes() for line in copied) == weights
    assert with_copy.static.bytes() == without.static.bytes() + weights
    assert (with_copy.assumptions["reference"], without.assumptions["reference"]) == ("copy", "none")
    assert with_copy.trainable_parameters == without.trainable_parameters


def test_an_adapter_is_switched_off_for_the_reference() -> None:
    result = estimate(MODEL, method="lora", **DPO)
    assert result.assumptions["reference"] == "adapter_off"
    assert not [line for line in result.static if line.name.startswith("reference model")]
    assert peak(method="lora") >= peak(method="lora", precompute_ref_log_probs=True)


def test_a_reward_model_scores_a_pair_and_projects_no_vocabulary() -> None:
    result = estimate(MODEL, method="lora", trainer="trl-reward", batch_size=2, seq_len=S)
    assert result.peaks is not None
    assert result.assumptions["model_class"] == "LlamaForSequenceClassification"
    assert next(line.shape for line in result.static if line.name.startswith("score")) == (1, MODEL["hidden_size"])
    assert not [line for line in result.peaks.ledgers["forward"] if MODEL["vocab_size"] in line.shape[1:]]


def test_the_warm_up_leaves_out_what_is_cached() -> None:
    """Qwen2.5-0.5B beside its policy, on the emulated card: 988,065,536 bytes of weights, 43,865,088 cached."""
    assert warm_up(988_065_536, 43_865_088) == 944_200_448
    assert warm_up(1_000, 600) == 0
    assert warm_up(4 * 2**30, int(2.2 * 2**30)) == (int(2.2 * 2**30) + 1) // 2 * 2  # whole elements of fp16


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"trainer": "trl", "beta": 0.1}, InputError, "SFTTrainer of trl 1.16 has no such option; accepted: trainer trl-dpo"),
        ({"trainer": "trl-reward", "max_completion_length": 9}, InputError, "RewardTrainer of trl 1.16 has no such option"),
        ({"engine": "trace"}, RefusedError, "engine: trace follows a step of one forward, not that of DPOTrainer of trl 1.16"),
        ({"loss": "liger"}, RefusedError, "loss: DPOTrainer of trl 1.16 cannot compute the liger loss; accepted: trl-chunked"),
        ({"trainer": "trl-reward", "task_type": "CAUSAL_LM"}, RefusedError, "trains classes that score a sequence, not Llama"),
    ],
)
def test_what_a_trainer_has_not_is_refused(options: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error) as refused:
        estimate(MODEL, **{**DPO, **options})
    assert reason in str(refused.value)


def test_several_gpus_have_no_formula_yet() -> None:
    result = estimate("llama-3.2-1b", trainer="trl-dpo", gpus=2, strategy="fsdp2")
    assert result.peaks is None
    assert "a step with FSDP2 over 2 GPUs and DPOTrainer of trl 1.16" in result.not_modelled[0]
