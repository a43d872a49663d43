"""What `auto` stands for in a DeepSpeed config: the numbers that transformers fills in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from peftplan.distributed.zero import persistence, reduce_bucket
from peftplan.job.prepare import prepare

FILLED_IN: dict[tuple[str, int], tuple[int, int | None]] = {
    ("gpt2", 2): (589_824, None),
    ("gpt2", 3): (589_824, 7_680),
    ("gpt2-xl", 3): (2_560_000, 16_000),
    ("llama-2-7b", 2): (16_777_216, None),
    ("llama-2-7b", 3): (16_777_216, 40_960),
    ("llama-2-70b", 3): (67_108_864, 81_920),
}
"""Model and stage → `reduce_bucket_size` and `stage3_param_persistence_threshold`, as
`HfTrainerDeepSpeedConfig.trainer_config_finalize` leaves them (transformers 5.24.0, integrations/deepspeed.py, lines 194-245;
printed by the marked test below with DeepSpeed 0.19.8)."""


def config(stage: int) -> dict[str, Any]:
    sizes = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto")
    return {"zero_optimization": {"stage": stage, **sizes}, "train_micro_batch_size_per_gpu": 1}


@pytest.mark.parametrize(("model", "stage"), FILLED_IN)
def test_auto_is_what_transformers_fills_in(model: str, stage: int) -> None:
    job = prepare(model, method="full", gpus=2, deepspeed=config(stage))
    assert job.distributed is not None
    bucket, threshold = FILLED_IN[model, stage]
    assert reduce_bucket(job.distributed, job.architecture.hidden_size) == bucket
    if threshold is not None:
        assert persistence(job.distributed, job.architecture.hidden_size) == threshold


@pytest.mark.rehearse
@pytest.mark.parametrize(("model", "stage"), FILLED_IN)
def test_transformers_fills_in_the_same(model: str, stage: int) -> None:
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    filled = HfTrainerDeepSpeedConfig(config(stage))
    hidden_size = prepare(model).architecture.hidden_size
    arguments = SimpleNamespace(get_warmup_steps=lambda num_training_steps: 0)
    filled.trainer_config_finalize(arguments, SimpleNamespace(config=SimpleNamespace(hidden_size=hidden_size)), 10)
    zero = filled.config["zero_optimization"]
    threshold = zero["stage3_param_persistence_threshold"]
    assert (zero["reduce_bucket_size"], None if threshold == "auto" else threshold) == FILLED_IN[model, stage]
