"""Trainers with a teacher or a reward model: what they hold of it, and what they refuse."""

from __future__ import annotations

from math import prod

import pytest

import peftplan
from peftplan.errors import InputError, OptionError, RefusedError

JOB = {"model": "smollm2-135m", "trainer": "trl-gkd", "method": "lora", "r": 8, "dtype": "fp32"}
PARAMETERS = 361_821_120
"""Of SmolLM2-360M: 49,152 x 960 + 32 x (960 x (960 + 320 + 320 + 960 + 3 x 2,560) + 2 x 960) + 960."""


def test_the_teacher_is_loaded_beside_the_student_in_its_dtype() -> None:
    ledger = peftplan.estimate(**JOB, teacher_model="smollm2-360m").ledger
    weights = [line for line in ledger if line.name.startswith("teacher: ") and line.category == "weights"]
    assert sum(line.bytes() for line in weights) == 4 * PARAMETERS + 65 * (4096 - 4 * 960)  # norms take whole blocks of 512 bytes


def test_all_logits_of_both_are_held_seventeen_times() -> None:
    """As `generalized_jsd_loss` of trl makes them, by hand: the logits of both, and of every position but the last those divided
    by the temperature (2), their log-probabilities (2), the stacked parts of the mixture (2), the mixture (1), of the teacher's
    divergence a factor and the result (2), of the student's both factors and the result (3), both weighed, and their sum (3).
    """
    peaks = peftplan.estimate(**JOB, teacher_model="smollm2-360m", batch_size=2, seq_len=512).peaks
    of_tokens = (line for line in peaks.ledgers["forward"] if {511, 512} & {*line.shape})
    of_logits = sum(line.bytes() for line in of_tokens if line.shape[-1] == 49_152)
    assert of_logits == (2 * 512 + 15 * 511) * 2 * 49_152 * 4


def test_swift_compares_512_scored_tokens_at_a_time() -> None:
    """`gkd_loss` of ms-swift in fp32, by hand, for 2 x 511 scored tokens, which are 512 and 510: the logits of both models, those
    of scored tokens of both as they are and divided (4). Of each part stay the student's log-probabilities, the mixture and its
    two stacked parts, the teacher's probabilities, the student's, and the difference (7). At the peak the second part has its
    teacher's log-probabilities and the last product beside them.
    """
    job = JOB | {"trainer": "swift-gkd-of-data", "dtype": "bf16"}
    peaks = peftplan.estimate(**job, teacher_model="smollm2-360m", batch_size=2, seq_len=512).peaks
    assert peaks is not None
    of_tokens = (line for line in peaks.ledgers["forward"] if line.shape[-1:] == (49_152,) and line.dtype == "fp32")
    scored = 2 * 511
    assert sum(line.bytes() for line in of_tokens) == (2 * 1024 + 4 * scored + 7 * scored + 2 * 510) * 49_152 * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "teacher_model: GKDTrainer of trl 1.16 needs one; accepted: a model of the same vocabulary"),
        ({"teacher_model": "llama-3.2-1b"}, "compares distributions over one vocabulary, not 128,256 with 49,152"),
    ],
)
def test_refusals(settings: dict[str, str], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        peftplan.estimate(**JOB, **settings)


def test_gold_gives_the_teacher_as_many_embeddings_as_the_student_has() -> None:
    """Qwen2.5-0.5B has 151,936 tied embeddings of 896 numbers; 49,152 of them are left beside SmolLM2."""
    ledger = peftplan.estimate(**JOB | {"trainer": "trl-gold"}, teacher_model="qwen2.5-0.5b").ledger
    weights = [line for line in ledger if line.name.startswith("teacher: ") and line.category == "weights"]
    assert sum(line.copies * prod(line.shape) for line in weights) == 494_032_768 - (151_936 - 49_152) * 896


def test_an_unknown_teacher_is_named_as_typed() -> None:
    with pytest.raises(InputError, match=r"teacher_model: 'smollm2-360' is not valid; .*accepted: one of"):
        peftplan.estimate(**JOB, teacher_model="smollm2-360")


def test_the_weight_of_a_mixture_is_at_most_1() -> None:
    with pytest.raises(InputError, match=r"beta: 2.0 is not valid; GKDTrainer of trl .* accepts a number from 0 to 1"):
        peftplan.estimate(**JOB, teacher_model="smollm2-360m", beta=2.0)


def test_other_trainers_have_no_teacher() -> None:
    with pytest.raises(
        OptionError, match="accepted: with --trainer trl-gkd, trl-gold, trl-distillation, swift-grpo-taught, swift-gkd"
    ):
        peftplan.estimate("smollm2-135m", trainer="trl-dpo", teacher_model="smollm2-360m")


def test_a_quantized_student_has_no_formula_yet() -> None:
    result = peftplan.estimate(**JOB | {"method": "qlora", "dtype": "bf16"}, teacher_model="smollm2-360m")
    assert result.not_modelled[0] == "a quantized base under GKDTrainer of trl 1.16 (no formula yet)"


ONLINE = {"model": "smollm2-135m", "trainer": "trl-online-dpo", "method": "full", "dtype": "fp32"}


def test_a_reward_model_is_held_beside_two_others() -> None:
    """SmolLM2-135M has 134,515,008 parameters, a tied head among them; its score has 576. 61 norms of 576 x 4 B take 2,560."""
    ledger = peftplan.estimate(**ONLINE, reward_model="smollm2-135m").ledger
    weights = {
        name: sum(line.bytes() for line in ledger if line.name.startswith(name) and line.category == "weights")
        for name in ("reward model: ", "reference model: ")
    }
    of_policy = 4 * 134_515_008 + 61 * (2560 - 4 * 576)
    assert weights == {"reward model: ": of_policy + 2560, "reference model: ": of_policy}


def test_completions_alone_are_scored_of_all_logits() -> None:
    """By hand, while the reference's logits become fp32: those in 16 bits and in 32 of 16 rows of 512 tokens, and the policy's
    log-probabilities of 32 tokens a row."""
    sizes = {"batch_size": 8, "seq_len": 512, "max_completion_length": 32}
    peaks = peftplan.estimate(**ONLINE, **sizes, reward_model="smollm2-135m").peaks
    assert peaks is not None
    of_logits = [line for line in peaks.ledgers["forward"] if line.shape[-1:] == (49_152,)]
    assert sum(line.bytes() for line in of_logits) == 16 * 49_152 * (512 * (2 + 4) + 32 * 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "reward_model: OnlineDPOTrainer of trl 1.16 needs one; accepted: a model"),
        ({"reward_model": "smollm2-135m", "beta": 0.2}, "OnlineDPOTrainer of trl 1.16 has no such option"),
    ],
)
def test_online_dpo_needs_a_reward_model(settings: dict[str, object], message: str) -> None:
    with pytest.raises((RefusedError, OptionError), match=message):
        peftplan.estimate(**ONLINE, **settings)


def test_online_dpo_of_a_quantized_base_or_under_zero3_has_no_formula() -> None:
    for settings in ({"method": "qlora", "dtype": "bf16"}, {"strategy": "zero3", "gpus": 2}):
        result = peftplan.estimate(**ONLINE | settings, reward_model="smollm2-135m")
        assert "OnlineDPOTrainer of trl 1.16" in result.not_modelled[0]
