"""Groups of ranks: each unlike rank has its own bytes and lines. Rehearsals of ranks that need less than the largest."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

import peftplan
from peftplan.analytic.compiled import COMPILED
from peftplan.analytic.engine import analytic_peaks
from peftplan.analytic.instant import InstantPeaks
from peftplan.analytic.of_ranks import OfRanks
from peftplan.results.distributed import RankGroup
from tools.each_rank import RESERVES_MORE, rows
from tools.rank_jobs import CARD, PHASES, options

ROWS = rows()


def group_of(result: peftplan.Estimate, rank: int) -> RankGroup:
    assert result.distributed is not None
    return next(group for group in result.distributed.ranks if rank in group.ranks)


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['name']} rank {row['rank']}" for row in ROWS])
def test_a_rehearsed_rank(row: dict[str, Any]) -> None:
    """Each phase within 0.1 % of torch's own allocator on that rank, traces too; reserved equal, under FSDP within 0.5 %."""
    result = peftplan.estimate(**options(row), gpu=CARD)
    peaks = group_of(result, row["rank"]).peaks
    assert peaks is not None
    assert result.peaks is not None
    assert max(row["peak_by_phase"].values()) <= 1.0005 * result.peaks.allocated, "no rank needs more than is stated"
    for phase in PHASES:
        assert peaks.by_phase[phase] == pytest.approx(row["peak_by_phase"][phase], rel=1e-3), phase
    assert peaks.reserved == pytest.approx(row["peak_reserved"], rel=5e-3 if row["strategy"] in ("fsdp1", "fsdp2") else 0)
    if traced := row.get("traced"):
        for phase in PHASES:
            assert traced["peak_by_phase"][phase] == pytest.approx(row["peak_by_phase"][phase], rel=1e-3), phase
        assert traced["peak_reserved"] == row["peak_reserved"]


TIED = 'fsdp1 full 4 config={"tie_word_embeddings": true}'
"""Ranks 2 and 3 reserve a tenth more than rank 0: their AdamW keeps states of parts of few large matrices."""


MORE = [row for row in ROWS if row["name"] in (TIED, RESERVES_MORE["name"])]


@pytest.mark.parametrize("row", MORE, ids=lambda row: f"{row['strategy']} rank {row['rank']}")
def test_a_verdict_counts_the_rank_that_reserves_most(row: dict[str, Any]) -> None:
    result = peftplan.estimate(**options(row), gpu=CARD)
    peaks = result.peaks
    assert isinstance(peaks, OfRanks)
    of_first = peaks.of(0)
    assert of_first is not None
    assert of_first.reserved < row["peak_reserved"] <= peaks.reserved_at_most <= (result.gpus[0].needed_bytes or 0)


def test_a_rank_of_fsdp_1_has_the_step_of_the_first_one() -> None:
    """The step is not recorded again, as it is where no other rank's is cached."""
    row = next(row for row in ROWS if row["name"] == TIED)
    of_group = group_of(peftplan.estimate(**options(row), gpu=CARD), row["rank"]).peaks
    assert isinstance(of_group, InstantPeaks)
    shared = dict(of_group.by_phase), of_group.reserved
    COMPILED.clear()
    again = analytic_peaks(of_group.inventory._replace(), compute_capability=of_group.compute_capability)
    assert (again.by_phase, again.reserved) == shared


JOBS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "LoRA of rank 16 over 64: each of the first 16 ranks has a row of A": ({"strategy": "fsdp2", "gpus": 64}, ["0-15", "16-63"]),
    "the same in two shard groups": (
        {"strategy": "fsdp2", "gpus": 64, "dp_shard_size": 32},
        ["0-15, 32-47", "16-31, 48-63"],
    ),
    "rows that 8 ranks divide": ({"strategy": "fsdp2", "gpus": 8}, ["0-7"]),
    "ZeRO-3 pads all parts": ({"strategy": "zero3", "gpus": 3}, ["0-2"]),
    "the first rank reads for the others": (
        {"strategy": "fsdp2", "gpus": 64, "cpu_ram_efficient_loading": True},
        ["0", "1-15", "16-63"],
    ),
    "DDP": ({"strategy": "ddp", "gpus": 4}, ["0-3"]),
    "a pipeline: the last stage has the norm and the tied embedding too": (
        {"strategy": "tp", "gpus": 8, "pp_size": 2, "method": "full"},
        ["0-3", "4-7"],
    ),
    "28 layers in three stages, whose embedding is tied: 10, 9 and 9": (
        {"model": "qwen2.5-1.5b", "strategy": "tp", "gpus": 6, "pp_size": 3, "method": "full"},
        ["0-1", "2-3", "4-5"],
    ),
}
"""What is divided → a job, and its groups of ranks."""


@pytest.mark.parametrize(("job", "groups"), JOBS.values(), ids=JOBS.keys())
def test_ranks_in_groups(job: dict[str, Any], groups: list[str]) -> None:
    settings = {"method": "lora", "r": 16, **job} if job.get("method") != "full" else job
    result = peftplan.estimate(**{"model": "llama-3.2-1b", **settings})
    block, memory = result.to_dict()["distributed"], result.to_dict()["memory"]
    assert [group["ranks"]["words"] for group in block["ranks"]] == groups
    assert sum(group["ranks"]["count"] for group in block["ranks"]) == job["gpus"]
    assert max(group["persistent"] for group in block["ranks"]) == memory["persistent"]
    assert any(group["lines"] == memory["lines"] for group in block["ranks"])


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "fsdp1", "fsdp2", "device-map"])
@pytest.mark.parametrize("seq_len", [16, 2048])
def test_the_largest_group_is_what_the_estimate_states(strategy: str, seq_len: int) -> None:
    """All numbers of `memory` are those of the largest rank; no other group has a larger peak."""
    options = {"gradient_accumulation_steps": 3, "seq_len": seq_len}
    result = peftplan.estimate("llama-3.2-1b", method="full", gpus=5, strategy=strategy, **options)
    document = result.to_dict()
    memory, groups = document["memory"], document["distributed"]["ranks"]
    largest = max(groups, key=lambda group: group["peak_allocated"] or 0)
    assert len(groups) > 1
    names = ("lines", "peak_by_phase", "peak_allocated", "peak_reserved", "persistent")
    assert all(largest[name] == memory[name] for name in names)
    assert all(
        sum(line["bytes"] for line in group["lines"] if line["place"] == "device") == group["peak_allocated"] for group in groups
    )


def test_of_many_unlike_ranks_those_are_counted_that_can_be_the_largest() -> None:
    """64 ranks of ZeRO-2: the others have what lasts, and no peak. Nothing is counted before the groups are read."""
    result = peftplan.estimate("llama-3.2-1b", method="full", gpus=64, strategy="zero2", gradient_accumulation_steps=2)
    assert result.distributed is not None
    assert "ranks" not in vars(result.distributed)
    counted = [group for group in result.distributed.ranks if group.peaks]
    (other,) = (group for group in result.distributed.ranks if not group.peaks)
    assert sum(len(group.ranks) for group in counted) <= 4
    assert len(other.ranks) >= 60
    assert {group.persistent for group in result.distributed.ranks} == {result.persistent_bytes}
    assert result.peaks is not None
    assert max(group.peaks.allocated for group in counted if group.peaks) == result.peaks.allocated
    assert other.to_dict()["peak_by_phase"] is None


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1"])
def test_the_shards_of_all_ranks_are_the_model(strategy: str) -> None:
    """Rows of 8-rank adapters over 64 ranks: AdamW's two moments of all ranks are those of one GPU, without padding."""
    one = peftplan.estimate("llama-3.2-1b", method="lora", r=8)
    several = peftplan.estimate("llama-3.2-1b", method="lora", r=8, strategy=strategy, gpus=64)

    def moments(lines: Any) -> int:
        states = (line for line in lines if line.category == "optimizer_states" and "exp_avg" in line.name)
        return sum(line.copies * line._replace(place="host").bytes() // line.copies for line in states)

    assert several.distributed is not None
    groups = several.distributed.ranks
    assert sum(len(group.ranks) * moments(group.static) for group in groups) == moments(one.static)
    if strategy == "fsdp2":
        assert all(more.persistent > less.persistent for more, less in pairwise(groups))


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize(
    ("model", "settings", "trained"),
    [
        (
            "llama-3.2-1b",
            {"method": "partial", "trainable_layers": 2},
            2 * (2 * 2048**2 + 2 * 512 * 2048 + 3 * 8192 * 2048 + 4096),
        ),
        ("qwen2.5-vl-7b-instruct", {"method": "full"}, 8_292_166_656),  # as its safetensors hold; two matrices share a name
    ],
)
def test_masters_of_zero_are_those_of_the_tensors_that_train(strategy: str, model: str, settings: Any, trained: int) -> None:
    """Four bytes for each number over all ranks, and padding: not those of frozen layers whose names are the same."""
    result = peftplan.estimate(model, gpus=4, strategy=strategy, **settings)
    assert result.distributed is not None
    static = result.distributed.ranks[0].static
    masters = sum(line.bytes() for line in static if line.source == "DeepSpeed: single_partition_of_fp32_groups")
    assert masters * 4 == pytest.approx(4 * trained, rel=1e-5)
