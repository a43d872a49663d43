"""Formulas against trl's older online trainers, rehearsed with trl 1.10 and models of few layers whose configs the rows keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftplan import estimate
from peftplan.errors import OptionError
from peftplan.job.trainer_words import TrainerName
from tools.rehearsed_jobs import drifts, read

ROWS = read(Path(__file__).with_name("scored.jsonl"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["job"]))
def test_formulas_hold_what_trl_holds(row: dict[str, Any], tmp_path: Path) -> None:
    """A rehearsal counts completions into the step before; those of a second micro batch into backward."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(row["reward_config"]), encoding="utf-8")
    drift = drifts({**row, "job": f"{row['job']} --reward-model {config}"}, "analytic")
    assert drift is not None
    assert "reserved" not in drift
    assert abs(drift["allocated"]) < 0.1


PYTHIA: dict[str, Any] = {"reward_model": "pythia-160m", "dtype": "fp32", "method": "full", "model": "pythia-160m"}
NOT_REHEARSED: tuple[dict[str, Any], ...] = (
    *({"method": "lora"}, {"dtype": "bf16"}, {"strategy": "ddp", "gpus": 2}, {"strategy": "zero3", "gpus": 2}),
    *({"optim": "adafactor"}, {"autocast": "fp16"}),
    *({"attn_implementation": "eager"}, {"reward_model": "llama-3.2-1b"}, {"model": "gpt2"}),
)
OF_PPO: tuple[dict[str, Any], ...] = ({"reward_model": "qwen2.5-0.5b"}, {"use_cache": False}, {"autocast": "bf16"})
OF_OTHERS: tuple[dict[str, Any], ...] = ({"gradient_checkpointing": False}, {"use_reentrant": True}, {"padding": True})


@pytest.mark.parametrize("trainer", ["trl-nash-md", "trl-xpo", "trl-ppo"])
def test_only_what_was_rehearsed_has_a_peak(trainer: TrainerName) -> None:
    assert estimate(**{**PYTHIA, "trainer": trainer}).peaks is not None
    for other in (*NOT_REHEARSED, *(OF_PPO if trainer == "trl-ppo" else OF_OTHERS)):
        assert estimate(**{**PYTHIA, "trainer": trainer, **other}).peaks is None, other


@pytest.mark.parametrize("trainer", ["trl-nash-md", "trl-xpo", "trl-ppo", "trl-online-dpo"])
def test_a_reference_is_there_whatever_it_weighs(trainer: TrainerName) -> None:
    """No `beta` leaves it out, also not 0."""
    with pytest.raises(OptionError, match="beta"):
        estimate(**{**PYTHIA, "trainer": trainer, "beta": 0.0})


@pytest.mark.parametrize("trainer", ["trl-nash-md", "trl-ppo"])
def test_deepspeed_casts_every_model(trainer: TrainerName) -> None:
    """Also those that do not train: a rehearsal held half of what was counted for the reward model."""
    job = {**PYTHIA, "trainer": trainer, "strategy": "zero2", "gpus": 2, "autocast": "bf16"}
    lines = estimate(**job).to_dict()["memory"]["lines"]
    (table,) = (line for line in lines if line["name"] == "reward model: gpt_neox.embed_in.weight")
    assert table["bytes"] == 2 * 50304 * 768


def test_ppo_shows_eight_completions_after_its_first_step() -> None:
    """However few a step has."""
    job = {**PYTHIA, "trainer": "trl-ppo", "seq_len": 520, "max_completion_length": 512, "batch_size": 1}
    peaks = estimate(**job, gradient_accumulation_steps=1).peaks
    completion = 512 * 50304 * 4
    assert peaks is not None
    assert peaks.by_phase["generate"] > 8 * 2 * completion


def test_ppo_writes_and_scores_completions_in_parts() -> None:
    """Of at most 64. A last one that has fewer is padded, which has no formula: a rehearsal of 8 by threes held 1.0 % more."""
    job = {**PYTHIA, "trainer": "trl-ppo", "seq_len": 520, "max_completion_length": 512, "batch_size": 1}
    peaks = [estimate(**job, gradient_accumulation_steps=each).peaks for each in (64, 65, 128)]
    assert [peak is None for peak in peaks] == [False, True, False]
    whole, parts = (estimate(**job, gradient_accumulation_steps=64, rollout_batch_size=each).peaks for each in (64, 16))
    assert whole is not None
    assert parts is not None
    assert parts.by_phase["generate"] < whole.by_phase["generate"]


def test_logits_that_grow_leave_a_verdict_open() -> None:
    """Those that policy and reference mix fit no block of the token before: a rehearsal reserved ten times what was allocated."""
    job = {**PYTHIA, "batch_size": 8, "seq_len": 512, "max_completion_length": 64, "gpu": "h100"}
    words = [estimate(**{**job, "trainer": trainer}).gpus[0].verdict for trainer in ("trl-xpo", "trl-nash-md")]
    assert words == ["fits", "unknown"]
