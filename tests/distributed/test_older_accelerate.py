"""Releases of accelerate that shard otherwise under FSDP2: rows of `rank_jobs.jsonl` with their name are rehearsed."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from tools.rank_grid import LLAMA

JOB: dict[str, Any] = {"method": "lora", "r": 16, "gpus": 4, "strategy": "fsdp2", "seq_len": 512}
BASE = 2 * 128256 * 2048 + 3 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048) + 2048
"""Elements: embedding and head, three layers of q and o, k and v, the MLP and two norms, the last norm."""


@pytest.mark.parametrize(("accelerate", "itemsize"), [("1.8", 4), ("1.12", 4), ("1.13", 2), ("1.15", 2)])
def test_what_a_release_casts(accelerate: str, itemsize: int) -> None:
    """A rank of four has a quarter of the frozen base, in fp32 where all shards are cast (`fsdp2_prepare_model`)."""
    result = peftplan.estimate(LLAMA, **JOB, accelerate=accelerate)
    assert result.static.bytes(("weights",)) == itemsize * BASE // 4
    assert result.peaks is not None


def test_the_root_is_freed_after_forward() -> None:
    """Before 1.14 embedding, norm and head are gathered with the root, of 16 bits, and again in backward; since then the head
    stays. Rehearsed: rows of `rank_jobs.jsonl`.
    """
    older, newer = (peftplan.estimate(LLAMA, **JOB, accelerate=release).peaks for release in ("1.13", "1.14"))
    assert older is not None
    assert newer is not None
    gathered = [peaks.ledgers["backward"].by_category()["gathered_weights"] for peaks in (older, newer)]
    assert gathered[0] - gathered[1] == 2 * 128256 * 2048 * 2 - 128256 * 2048 * 2


@pytest.mark.parametrize(
    "options",
    [
        {"accelerate": "1.7"},
        {"method": "qlora", "quant_storage": "bf16"},
        {"use_dora": True},
        {"optim": "adagrad"},
        {"dtype": "fp16", "autocast": "fp16"},
        {"offload_params": "cpu"},
        {"trainer": "llamafactory", "accelerate": None},
        {"cp_size": 2},
        {"dp_shard_size": 2, "accelerate": "1.9"},
    ],
)
def test_what_was_not_rehearsed_has_no_peak(options: dict[str, Any]) -> None:
    assert peftplan.estimate(LLAMA, **{**JOB, "accelerate": "1.12", **options}).peaks is None


def test_ranks_in_groups_are_as_rehearsed() -> None:
    """LoRA of three layers over 2 groups of 4 ranks with 1.12, rehearsed: backward 3,159,117,824 B, reserved equal."""
    peaks = peftplan.estimate(LLAMA, **JOB | {"gpus": 8}, dp_shard_size=4, accelerate="1.12", gpu="h200").peaks
    assert peaks is not None
    assert peaks.by_phase["backward"] == pytest.approx(3_159_117_824, rel=2e-5)
    assert peaks.reserved == 4_204_789_760


@pytest.mark.parametrize(("accelerate", "first"), [("1.7", "1.8"), ("1.9", "1.14")])
def test_a_release_without_a_peak_says_which_has_one(accelerate: str, first: str) -> None:
    result = peftplan.estimate(LLAMA, **JOB, accelerate=accelerate, offload_params="cpu")
    assert f"a release before accelerate {first} " in result.not_modelled[0]
