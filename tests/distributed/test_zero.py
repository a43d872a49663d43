"""ZeRO-1 and ZeRO-2: sums by hand beside the rehearsals of `test_peaks.py`."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.distributed.strategy import Distributed
from peftplan.distributed.zero import groups_of, largest_rank, partition, slots_of
from peftplan.errors import PeftplanError
from peftplan.job.inventory import inventory
from peftplan.job.prepare import prepare
from peftplan.memory.zero0 import flat_pieces
from peftplan.results.estimate import Estimate
from peftplan.units import round512

TRAINED = 1_235_814_400
"""Parameters of Llama-3.2-1B."""


def estimated(strategy: str, world: int, **options: Any) -> Estimate:
    return peftplan.estimate("llama-3.2-1b", gpus=world, strategy=strategy, **{"method": "full"} | options)  # type: ignore[arg-type]


def over(world: int) -> Distributed:
    return Distributed(strategy="zero2", gpus=world)


def test_norms_are_a_group_of_their_own() -> None:
    """33 norms of 2,048 elements have no weight decay; each group is padded to 2 elements per rank."""
    parameters = inventory(prepare("llama-3.2-1b", method="full")).parameters
    weights, norms = groups_of(parameters.all)
    assert sum(p.copies * p.numel for p in norms) == 33 * 2048
    assert partition(norms, 7) == 9656  # 67,584 of 7 parts of 9,656, the last of which is padded by 8
    assert partition(weights, 4) == (TRAINED - 33 * 2048) // 4


def test_an_adapter_has_one_group() -> None:
    assert len(groups_of(inventory(prepare("llama-3.2-1b", method="lora")).parameters.all)) == 1


def test_the_largest_rank_is_where_whole_gradients_meet() -> None:
    """Of 4 ranks the first two share the embedding, which is larger than a part; the second has layers besides."""
    slots = slots_of(inventory(prepare("llama-3.1-8b", method="full")).parameters, over(16))
    embedding = slots["model.embed_tokens.weight", None]
    assert list(embedding.parts) == [(0, 501_874_688), (1, 525_336_576 - 501_874_688)]
    assert largest_rank(slots) == 1
    reaching = sum(slot.numel for slot in slots.values() if slot.of_rank(0))
    assert reaching == 525_336_576 + 5 * 4096  # and norms: 65 of them over 16 ranks


def test_without_zero_every_rank_holds_fp32_masters_and_their_states() -> None:
    """16-bit weights, then 4 B of a master and 8 B of its states for each parameter; `step` of fused AdamW is 512 B a tensor."""
    result = estimated("zero0", 4)
    tensors = 1 + 16 * 9 + 1
    assert result.static.bytes(("weights",)) == 2 * TRAINED
    assert result.static.bytes(("gradients",)) == 2 * TRAINED
    assert result.static.bytes(("optimizer_states",)) == 12 * TRAINED + 512 * tensors
    assert estimated("zero0", 16).persistent_bytes == result.persistent_bytes


def test_without_zero_gradients_are_copied_in_pieces() -> None:
    """Of 1,235,814,400 elements: the embedding and layers until there are more than 500,000,000, and what is left."""
    pieces = flat_pieces(inventory(prepare("llama-3.2-1b", method="full")).parameters)
    assert sum(pieces) == TRAINED
    assert all(numel > 500_000_000 for numel in pieces[:-1])


def test_zero_1_keeps_all_gradients_while_its_first_rank_makes_room() -> None:
    """2 B for each of N gradients, the bucket, and what reaches into the rank's part, beside weights, masters and states."""
    peaks = peftplan.estimate("llama-3.1-8b", method="full", gpus=4, strategy="zero1", seq_len=16).peaks
    assert peaks is not None
    slots = slots_of(inventory(prepare("llama-3.1-8b", method="full")).parameters, Distributed(strategy="zero1", gpus=4))
    trained = sum(slot.numel for slot in slots.values())
    reaching = sum(slot.numel for slot in slots.values() if slot.of_rank(0))
    by_hand = 2 * trained + 12 * trained // 4 + 2 * (trained + 500_000_000 + reaching)
    assert peaks.by_phase["backward"] == pytest.approx(by_hand, rel=5e-4)  # and logits of 16 tokens


def test_an_offloaded_optimizer_is_on_the_host() -> None:
    """Per element of the rank's part: master 4 B, gradient 4, two moments 8, the updated weight 2; a buffer of the largest
    parameter, the table of 128,256 x 2,048, stays on the device.
    """
    offloaded = estimated("zero2", 4, offload_optimizer="cpu")
    assert offloaded.distributed is not None
    assert offloaded.distributed.host_bytes == pytest.approx(18 * TRAINED // 4, rel=1e-6)
    assert offloaded.static.bytes(["communication"]) == 2 * 128_256 * 2048
    assert offloaded.static.bytes(["optimizer_states"]) == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_buckets_do_not_depend_on_what_trains(overlap: bool) -> None:
    """16 tokens leave little else in backward: 2 B x 500,000,000 per bucket."""
    options = {"method": "lora", "overlap_comm": overlap, "seq_len": 16}
    default, small = (estimated("zero2", 4, **options, **more).peaks for more in ({}, {"reduce_bucket_size": 12_000_000}))
    assert default is not None
    assert small is not None
    buckets = (2 if overlap else 1) * (round512(2 * 500_000_000) - round512(2 * 12_000_000))
    assert default.by_phase["backward"] - small.by_phase["backward"] == pytest.approx(buckets, rel=0.1)


def test_a_card_without_room_for_a_flat_copy_flattens_on_the_host() -> None:
    """Mistral 7B over 64 ranks: 4 N while it is flattened, 29.0 GB; no later phase needs 20 GB."""
    result = peftplan.estimate("mistral-7b-v0.3", method="full", strategy="zero2", gpus=64, gpu="rtx-4090")
    assert result.peaks is not None
    assert result.peaks.by_phase["load"] == pytest.approx(4 * 7_248_023_552, rel=1e-3)
    assert result.peaks.by_phase["backward"] < 20e9
    assert [(card.verdict, card.runs_by_releasing_cache) for card in result.gpus] == [("tight", True)]


def test_what_was_not_rehearsed_is_named() -> None:
    result = estimated("zero2", 4, contiguous_gradients=False)
    assert result.peaks is None
    assert "contiguous_gradients" in result.to_dict()["not_modelled"][0]


def test_zero_1_keeps_all_gradients_until_the_boundary() -> None:
    """Two micro batches: 2 B per parameter more than ZeRO-2 in forward, whose rank keeps what reaches into its part."""
    one, two = (estimated(strategy, 64, gradient_accumulation_steps=2).peaks for strategy in ("zero1", "zero2"))
    assert one is not None
    assert two is not None
    slots = slots_of(inventory(prepare("llama-3.2-1b", method="full")).parameters, over(64))
    kept = sum(slot.numel for slot in slots.values() if slot.of_rank(largest_rank(slots)))
    bucket = 2 * 500_000_000  # made with the first gradient, and freed at the boundary
    assert one.by_phase["forward"] - two.by_phase["forward"] == pytest.approx(2 * (TRAINED - kept) + bucket, rel=1e-3)


def test_groups_take_deepspeed_s_defaults() -> None:
    from peftplan.distributed.zero import overlaps

    assert [overlaps(Distributed(strategy=s, gpus=2)) for s in ("zero1", "zero2", "zero3")] == [False, False, True]


def test_wider_sums_of_gradients_are_refused() -> None:
    config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    with pytest.raises(PeftplanError, match="data_types"):
        peftplan.estimate("llama-3.2-1b", gpus=2, deepspeed=config)
    config["data_types"] = {"grad_accum_dtype": "bf16"}
    assert peftplan.estimate("llama-3.2-1b", gpus=2, deepspeed=config).peaks is not None


def test_parameters_are_dealt_out_in_turn() -> None:
    """Of 2 ranks the first gets the tensors of even numbers: the table of tokens, key projections, ..."""
    parameters = inventory(prepare("llama-3.2-1b", method="full")).parameters
    slots = slots_of(parameters, Distributed(strategy="zero2", gpus=2, round_robin_gradients=True))
    first = [key for key, slot in slots.items() if slot.group == 0][:3]
    assert first == [
        ("model.embed_tokens.weight", None),
        ("model.layers.{}.self_attn.k_proj.weight", 0),
        ("model.layers.{}.self_attn.o_proj.weight", 0),
    ]
