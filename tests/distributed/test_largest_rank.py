"""`memory` is that of the rank with the largest peak, of all ranks: compared with each of them, counted on its own."""

from __future__ import annotations

import random
from typing import Any

import pytest

from peftplan.analytic.engine import analytic_peaks, peaks_of_one
from peftplan.analytic.instant import InstantPeaks
from peftplan.analytic.of_ranks import OfRanks
from peftplan.job.inventory import inventory, on_rank
from peftplan.job.prepare import prepare

CAPABILITY = "9.0"
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 6144}

TOWER = {"hidden_size": 128, "intermediate_size": 300, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


def beside_tower(text: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3 with a Llama's sizes. Its tower, which is first in the model, trains and gets no gradient."""
    kinds = {"layer_types": ["full_attention"] * text["num_hidden_layers"], "head_dim": 64, "model_type": "gemma3_text"}
    return {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text | kinds,
        "vision_config": {**TOWER, "model_type": "siglip_vision_model", "num_hidden_layers": text["num_hidden_layers"]},
        "mm_tokens_per_image": 4,
    }


def drawn(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A small Llama and a job of ZeRO-1 or ZeRO-2."""
    rng = random.Random(seed)
    model = {
        **SMALL,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": rng.choice([2, 3, 5, 8]),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": rng.random() < 0.5,
    }
    method = rng.choice(["full", "full", "lora", "qlora"])
    options = {
        "method": method,
        "strategy": rng.choice(["zero1", "zero2"]),
        "gpus": rng.choice([2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 33, 64]),
        "batch_size": rng.choice([1, 1, 2, 8]),
        "seq_len": rng.choice([8, 64, 512, 2048]),
        "gradient_accumulation_steps": rng.choice([1, 1, 2, 3]),
        "overlap_comm": rng.random() < 0.3,
        "round_robin_gradients": rng.random() < 0.2,
        "reduce_scatter": rng.random() < 0.9,
        "reduce_bucket_size": rng.choice([20_000, 300_000, 1_000_000, 500_000_000]),
    }
    if method != "full":
        options["r"] = rng.choice([4, 16, 128])
    if rng.random() < 0.2:
        options["offload_optimizer"] = "cpu"
    return model, options


def all_ranks(of_any: OfRanks) -> list[InstantPeaks]:
    """The peaks of each rank, counted on its own."""
    distributed = of_any.inventory.job.distributed
    assert distributed is not None
    return [
        peaks_of_one(on_rank(of_any.inventory, rank), of_any.compute_capability, {}) for rank in range(distributed.world_size)
    ]


@pytest.mark.parametrize("seed", range(30))
def test_no_rank_requests_more(seed: int) -> None:
    """In no phase does one of all ranks request more than the one that is stated, or than others that are compared with it."""
    model, options = drawn(seed)
    peaks = analytic_peaks(inventory(prepare(model, **options)), compute_capability=CAPABILITY)
    assert isinstance(peaks, OfRanks)
    each = all_ranks(peaks)
    assert max(peaks.requested.values()) == max(max(of_rank.requested.values()) for of_rank in each)
    compared = [each[rank] for rank in peaks.ranks_compared]
    for phase in peaks.requested:
        assert max(of_rank.requested[phase] for of_rank in each) == max(of_rank.requested[phase] for of_rank in compared)


@pytest.mark.parametrize("seed", range(100, 110))
def test_no_rank_with_a_tower_requests_more(seed: int) -> None:
    """Zeros stand for the gradients that the tower does not get, on the ranks whose partition it is in."""
    model, options = drawn(seed)
    options |= {"gpus": min(options["gpus"], 12), "gradient_accumulation_steps": seed % 3 + 1}
    peaks = analytic_peaks(inventory(prepare(beside_tower(model), **options)), compute_capability=CAPABILITY)
    assert isinstance(peaks, OfRanks)
    each = all_ranks(peaks)
    compared = [each[rank] for rank in peaks.ranks_compared]
    for phase in peaks.requested:
        assert max(of_rank.requested[phase] for of_rank in each) == max(of_rank.requested[phase] for of_rank in compared)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("seed", range(60, 90))
def test_no_rank_allocates_or_reserves_more(seed: int) -> None:
    """Up to 16 ranks, as the allocator counts, tails of blocks included. A verdict needs what the one that reserves most does."""
    model, options = drawn(seed)
    peaks = analytic_peaks(
        inventory(prepare(model, **options | {"gpus": min(options["gpus"], 8)})), compute_capability=CAPABILITY
    )
    assert isinstance(peaks, OfRanks)
    each = all_ranks(peaks)
    assert peaks.allocated == max(of_rank.allocated for of_rank in each)
    assert peaks.reserved_at_most == max(of_rank.reserved for of_rank in each)
