"""FSDP1 where the GPU is late: blocks that `record_stream` keeps count in a verdict."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.errors import InputError, RefusedError
from peftplan.hardware.context import context_for_verdict
from peftplan.hardware.gpus import find_gpu
from peftplan.hardware.usable import usable_bytes
from peftplan.planning.verdicts import verdict
from peftplan.results.estimate import Peaks
from tools.rank_grid import LLAMA

LAYER = 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048
"""Elements of a layer: q and o, k and v, the MLP, two norms."""


def peaks_of(method: str, **options: Any) -> Peaks:
    rank = {} if method == "full" else {"r": 16}
    result = peftplan.estimate(LLAMA, **{"method": method, "gpus": 4, "strategy": "fsdp1", "seq_len": 512, **rank, **options})  # type: ignore[arg-type]
    assert result.peaks is not None
    return result.peaks


def reserved_by_pace(peaks: Peaks) -> tuple[int, int]:
    """With a GPU that is never late, and with one that is as late as it may be."""
    assert peaks.reserved is not None
    assert peaks.reserved_at_most is not None
    return peaks.reserved, peaks.reserved_at_most


@pytest.mark.parametrize("backward_prefetch", ["none", "pre"])
def test_frozen_layers_wait_one_at_a_time(backward_prefetch: Any) -> None:
    """The host has waited for the last free but one before it gathers a layer, of 16 bits: one more is there than needed.

    Gradients of the adapter, below 2 MiB a layer, and the rounding of segments are the rest.
    """
    reserved, at_most = reserved_by_pace(peaks_of("lora", backward_prefetch=backward_prefetch))
    assert 2 * LAYER <= at_most - reserved <= 2 * LAYER + 16 * 2**20


def test_gradients_wait_with_the_layers_that_train() -> None:
    """A layer and up to two flat gradients of those behind it, in 16 bits; a cast shard of 1/4, and the rounding of segments."""
    reserved, at_most = reserved_by_pace(peaks_of("full"))
    assert 2 * 2 * LAYER <= at_most - reserved <= 4 * 2 * LAYER


@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_verdict_trusts_a_gpu_that_is_never_late(method: str) -> None:
    """Cards from too small to roomy: `fits` leaves 5 % of the card to the late GPU, `tight` runs there, `unknown` is between."""
    peaks = peaks_of(method)
    _, at_most = reserved_by_pace(peaks)
    words: list[str] = []
    for mib in range(peaks.allocated // 2**20 - 200, int(1.35 * at_most) // 2**20, 64):
        card = find_gpu(f"{mib}MiB")
        usable = usable_bytes(card).bytes
        room = usable - context_for_verdict(card).bytes
        word = verdict(card, 0, peaks, peaks.runs_within).verdict
        words += [word] if words[-1:] != [word] else []
        if word == "fits":
            assert room - at_most >= 0.05 * usable
        if word == "tight":
            assert room >= at_most or peaks.runs_within(room)
        if word == "does_not_fit":
            assert not peaks.may_run_within(room)
    assert words in (["does_not_fit", "unknown", "tight", "fits"], ["does_not_fit", "tight", "fits"])


def test_other_strategies_wait_for_nothing() -> None:
    """FSDP2 waits by events, without `record_stream`."""
    peaks = peaks_of("full", strategy="fsdp2")
    reserved, at_most = reserved_by_pace(peaks)
    assert (at_most, peaks.may_run_within(2**50)) == (reserved, False)


def test_a_host_without_a_limit_is_refused() -> None:
    config = {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": {"fsdp_limit_all_gathers": False}}
    with pytest.raises(InputError, match="fsdp_limit_all_gathers"):
        peftplan.estimate(LLAMA, method="full", accelerate_config=config)


def test_the_fused_optimizer_fails_in_fp16() -> None:
    """Rehearsed: `output with shape [] doesn't match the broadcast shape [1]` (torch 2.13, optim/adam.py, `_fused_adam`)."""
    with pytest.raises(RefusedError, match="adamw_torch_fused fails in the first step of FSDP1 in fp16"):
        peaks_of("full", dtype="fp16", autocast="fp16")


def test_gathering_behind_a_layer_has_no_peak() -> None:
    """LoRA+ of a small Granite over 2 GPUs, rehearsed: step 48,783,872 B, where a gathered layer would be 9,472,000 B more."""
    assert peftplan.estimate("llama-3.2-1b", method="lora", strategy="fsdp1", gpus=2, backward_prefetch="post").peaks is None
