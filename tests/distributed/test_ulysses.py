"""Ranks that share each row of tokens by DeepSpeed's Ulysses (`--sp-size`): what is counted, and what its libraries refuse.

Rehearsed jobs with `sp_size` are rows of rank_jobs.jsonl (`test_peaks`).
"""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.errors import InputError, OptionError, RefusedError

JOB: dict[str, Any] = {"model": "llama-3.2-1b", "method": "lora", "strategy": "zero3", "gpus": 4, "sp_size": 4, "seq_len": 4096}
SIZES: dict[str, Any] = {"parallelism_config_sp_size": 4, "parallelism_config_sp_backend": "deepspeed"}
CONFIG: dict[str, Any] = {
    "distributed_type": "DEEPSPEED",
    "num_processes": 4,
    "mixed_precision": "bf16",
    "deepspeed_config": {"zero_stage": 3},
    "parallelism_config": SIZES,
}


def of_config(**sizes: object) -> peftplan.Estimate:
    """The job as accelerate's file says it."""
    job = {name: value for name, value in JOB.items() if name in ("model", "method", "seq_len")}
    prefixed = {f"parallelism_config_{name}": value for name, value in sizes.items()}
    return peftplan.estimate(**job, accelerate_config=CONFIG | {"parallelism_config": SIZES | prefixed})


def test_ranks_share_a_row() -> None:
    """Logits in fp32 and their gradients are of 4,096 / 4 tokens: a quarter of those of whole rows."""
    shared, whole = peftplan.estimate(**JOB), peftplan.estimate(**JOB | {"sp_size": 1})
    logits = [sum(line["bytes"] for line in each.lines() if line["category"] == "logits") for each in (shared, whole)]
    assert 4 * logits[0] == logits[1] > 0
    assert shared.distributed is not None
    assert shared.distributed.global_batch_size == 1
    assert "batch size 1 per 4 ranks, which share each row, 1 per step" in shared.distributed.words


def test_gradients_are_reduced_in_fp32_unless_deepspeeds_file_says_otherwise() -> None:
    """The bucket of ZeRO-3, h² = 2,048² elements, is there from loading on; accelerate passes no such key on."""
    job = JOB | {"reduce_bucket_size": "auto"}
    wide, narrow = (peftplan.estimate(**job, seq_parallel_communication_data_type=dtype).peaks for dtype in (None, "bf16"))
    assert wide is not None
    assert narrow is not None
    assert wide.by_phase["step"] - narrow.by_phase["step"] == 2048**2 * 2
    file = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    own = {name: value for name, value in JOB.items() if name != "strategy"}
    of_file = peftplan.estimate(**own, deepspeed=file | {"seq_parallel_communication_data_type": "bf16"}).peaks
    assert of_file is not None
    assert of_file.allocated == narrow.allocated
    beside = CONFIG | {"deepspeed_config": {"zero_stage": 3, "seq_parallel_communication_data_type": "bf16"}}
    job = {name: value for name, value in JOB.items() if name in ("model", "method", "seq_len")}
    unread = peftplan.estimate(**job, accelerate_config=beside).peaks
    typed = peftplan.estimate(**JOB).peaks
    assert unread is not None
    assert typed is not None
    assert unread.allocated == typed.allocated


def test_a_config_of_accelerate_says_how_many_ranks_share_a_row() -> None:
    """`sp_attn_implementation` is sdpa unless it is set, and the model's own; flash-attn has no formula."""
    peaks, of_options = of_config().peaks, peftplan.estimate(**JOB).peaks
    assert peaks is not None
    assert of_options is not None
    assert peaks.allocated == of_options.allocated
    assert "sp_size" in of_config(sp_attn_implementation="flash_attention_2").not_modelled[0]
    with pytest.raises(RefusedError, match="dp_replicate_size x dp_shard_size x sp_size is 2; accepted: 4"):
        of_config(sp_size=2)
    assert of_config(sp_size=2, dp_shard_size=2).peaks is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sp_size": 3, "gpus": 3}, RefusedError, "Attention head count 32 is not divisible by SP size 3"),
        (
            {"model": "qwen2.5-7b", "sp_size": 7, "gpus": 7},
            RefusedError,
            "KV attention head count 4 is not divisible by SP size 7",
        ),
        ({"gpus": 6}, InputError, "accepted: a divisor of the 6 GPUs"),
        ({"seq_len": 4098}, InputError, "batch's seqlen=4098 isn't divisible by sp-size=4"),
        ({"attn_implementation": "eager"}, RefusedError, "Invalid sp_attn_implementation"),
        ({"deepspeed_version": "0.18.1"}, RefusedError, "requires deepspeed>=0.18.2"),
        ({"strategy": "fsdp2"}, OptionError, "has no such parameter; accepted: with --strategy zero0 or zero1"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        peftplan.estimate(**JOB | options)


@pytest.mark.parametrize(
    ("options", "unknown"),
    [
        ({}, None),
        ({"strategy": "zero1"}, None),
        ({"strategy": "zero0"}, "sp_size"),
        ({"method": "qlora"}, None),
        ({"method": "qlora", "double_quant": False, "quant": "fp4"}, "sp_size"),
        ({"padding": True}, "sp_size"),
        ({"batch_size": 2}, None),
        ({"batch_size": 2, "sp_size": 32, "gpus": 32}, "sp_size"),
        ({"attn_implementation": "flash_attention_2"}, "sp_size"),
        ({"model": "granite-3.3-2b-instruct"}, "sp_size"),
        ({"trainer": "trl"}, "sp_size"),
        ({"reduce_scatter": False, "strategy": "zero2"}, "sp_size"),
    ],
)
def test_what_was_not_rehearsed(options: dict[str, Any], unknown: str | None) -> None:
    result = peftplan.estimate(**JOB | options)
    assert (result.peaks is None) is (unknown is not None)
    assert unknown is None or unknown in result.not_modelled[0]
