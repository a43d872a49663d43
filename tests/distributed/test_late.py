"""FSDP1 where the GPU is late: blocks that `record_stream` keeps count in a verdict."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.analytic.of_ranks import OfRanks
from peftplan.errors import InputError, RefusedError
from peftplan.hardware.context import context_for_verdict
from peftplan.hardware.gpus import find_gpu
from peftplan.hardware.usable import usable_bytes
from peftplan.job.script import Script
from peftplan.planning.verdicts import verdict
from peftplan.report.answer import answer
from peftplan.report.screen import UNICODE, Screen
from peftplan.results.peaks import Peaks
from peftplan.units import format_bytes
from tools.rank_grid import LLAMA
from tools.rank_jobs import CARD, LATE, options, rows

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


@pytest.mark.parametrize("row", rows(LATE), ids=lambda row: row["name"])
def test_both_ends_are_rehearsed(row: dict[str, Any]) -> None:
    """torch's own allocator on a card that is never late, and on one that has done what the host has waited for and no more
    (`EMULATED_LATE`, rehearse/card.c): the same tensors but for tails of blocks, and reserved bytes at both ends of the first
    rank, which was rehearsed.
    """
    peaks = peftplan.estimate(**options(row), gpu=CARD).peaks
    in_time = next(own for own in rows() if own["name"] == row["name"])
    assert isinstance(peaks, OfRanks)
    assert row["peak_by_phase"] == pytest.approx(in_time["peak_by_phase"], rel=3e-4)
    first = peaks.of(0)
    assert first is not None
    assert (first.reserved, first.run(late=True).peaks().reserved) == (in_time["peak_reserved"], row["peak_reserved"])
    assert (peaks.reserved_at_most or 0) >= row["peak_reserved"]


def test_a_unit_that_trains_waits_less_than_its_gradients() -> None:
    """In backward a unit that trains is freed on its own stream, at once. Its flat gradient waits for the reduction that comes
    behind the next one: of three layers the gradients of two are there beside the third's, and a layer less gathered.
    """
    reserved, at_most = reserved_by_pace(peaks_of("full"))
    assert 2 * 2 * LAYER <= at_most - reserved <= 3 * 2 * LAYER


def test_json_and_text_say_both_ends() -> None:
    result = peftplan.estimate(LLAMA, method="full", gpus=4, strategy="fsdp1", seq_len=512, gpu=CARD)
    assert result.peaks is not None
    reserved, at_most = reserved_by_pace(result.peaks)
    document = result.to_dict()
    memory = document["memory"]
    assert (memory["peak_reserved"], memory["peak_reserved_at_most"]) == (reserved, at_most)
    assert result.gpus[0].needed_bytes == at_most + result.gpus[0].context_bytes
    text = "\n".join("".join(part.text for part in row) for row in answer(result, Screen(200, UNICODE)))
    assert f"reserved {format_bytes(reserved)} to {format_bytes(at_most)}, by how late the GPU is" in text
    assert "record_stream" not in " ".join(result.not_modelled)
    assert "peak_reserved_at_most" not in peftplan.estimate(LLAMA, method="full", gpus=4, strategy="fsdp2").to_dict()["memory"]


def test_a_late_gpu_keeps_shards_from_the_host_into_the_next_step() -> None:
    """The stream of a gather is recorded with what it reads of a frozen base (torch, `_all_gather_flat_param`), and no later work
    of the default stream waits for that: the next step needs the root's shard anew, a quarter of two tables in bf16. Before
    transformers 5.0 no forward waits for the GPU, and no rehearsal shows when they go.
    """
    reserved, at_most = reserved_by_pace(peaks_of("lora", offload_params="cpu"))
    assert 0 <= at_most - reserved - 2 * 128_256 * 2048 * 2 // 4 < 2 * 2**20
    job: dict[str, Any] = {"method": "lora", "gpus": 4, "strategy": "fsdp1", "seq_len": 512, "offload_params": "cpu"}
    older = peftplan.estimate(LLAMA, **job, script=Script(transformers="4.57"), gpu="80GiB")
    assert older.peaks is not None
    assert older.peaks.reserved is older.peaks.reserved_at_most is None
    assert older.gpus[0].verdict == "fits"
    assert any("record_stream" in what for what in older.not_modelled)


def test_a_unit_that_is_gathered_ahead_in_forward_keeps_its_gradients_longer() -> None:
    """It is split into views before the layer before it runs. Autograd runs nodes that were made later first, and so the backward
    of that layer before it makes the gradients flat: whole ones of two layers are there, where the head is small.
    """
    small = LLAMA | {"num_hidden_layers": 8, "vocab_size": 8000}
    options: dict[str, Any] = {"method": "full", "gpus": 4, "strategy": "fsdp1", "seq_len": 512, "backward_prefetch": "pre"}
    ahead, in_turn = (peftplan.estimate(small, **options, forward_prefetch=ahead).peaks for ahead in (True, False))
    assert ahead is not None
    assert in_turn is not None
    assert ahead.by_phase["backward"] - in_turn.by_phase["backward"] >= 2 * LAYER


def test_a_sweep_needs_what_an_estimate_needs() -> None:
    options: dict[str, Any] = {"method": "full", "gpus": 4, "strategy": "fsdp1", "gpu": CARD}
    (row,) = peftplan.sweep([LLAMA], seq_len=[512], **options).records()
    assert row["needed_bytes"] == peftplan.estimate(LLAMA, seq_len=512, **options).gpus[0].needed_bytes


@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_verdict_trusts_a_gpu_that_is_never_late(method: str) -> None:
    """From too small to roomy: `fits` leaves 5 % of the card to the late GPU, `tight` runs there, `unknown` is between. Both
    alternate, as it takes luck to find a block in few segments.
    """
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
    first, *between, last, roomy = words
    assert (first, last, roomy) == ("does_not_fit", "tight", "fits")
    assert set(between) <= {"unknown", "tight"}


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
