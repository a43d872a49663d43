"""What is true of every strategy, whatever the numbers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

import peftplan
from peftplan.distributed.shards import holding
from peftplan.distributed.strategy import Distributed
from peftplan.job.inventory import inventory
from peftplan.job.lines import gradient_lines, weight_lines
from peftplan.job.prepare import prepare
from peftplan.parameters import Parameters
from peftplan.results.estimate import Estimate
from peftplan.results.peaks import Peaks

WORLDS = (2, 3, 4, 8, 16, 64)
SHARDING = ("fsdp2", "fsdp1", "zero1", "zero2", "zero3", "tp")


def estimated(strategy: str, world: int, **options: Any) -> Estimate:
    return peftplan.estimate("llama-3.2-1b", gpus=world, strategy=strategy, **{"method": "lora"} | options)  # type: ignore[arg-type]


def bytes_of(parameters: Parameters) -> int:
    return weight_lines(parameters).bytes()


@pytest.mark.parametrize("strategy", SHARDING)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_more_ranks_never_hold_more(strategy: str, method: str) -> None:
    """Weights, gradients and states; 8 heads of keys and values bound tensor parallelism, which adapts a part of the modules."""
    worlds = [world for world in WORLDS if strategy != "tp" or 8 % world == 0]
    targets = {"target_modules": "q_proj,v_proj"} if (strategy, method) == ("tp", "lora") else {}
    sizes = [estimated(strategy, world, method=method, **targets).persistent_bytes for world in worlds]
    assert all(more >= less for more, less in pairwise(sizes))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", ["fsdp1", "zero3"])
def test_flat_shards_sum_to_the_model_and_its_padding(strategy: Any, world: int) -> None:
    """Units of FSDP1 and tensors of ZeRO-3 are padded to equal parts: less than one element per rank and tensor, but for FSDP1's
    alignment of each tensor to 16 B. Small tensors of ZeRO-3 are whole besides (`gathered_weights`).
    """
    counted = inventory(prepare("llama-3.2-1b", method="full", dtype="fp32"))
    built, architecture = counted.parameters, counted.job.architecture
    tensors = sum(p.copies for p in built.all)
    shards = holding(built, Distributed(strategy=strategy, gpus=world), architecture, autocast="none", upcasts=True).parameters
    of_rank = sum(p.copies * sum(a.numel for a in p.allocations if a.name == "weight") for p in shards.all)
    assert 0 <= of_rank * world - built.num_total < tensors * (world + 4)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_flat_masters_sum_to_what_trains_and_its_padding(strategy: Any, method: str, world: int) -> None:
    """Two groups, what decays and what does not: each is padded to parts of even length. The weights are whole on every rank."""
    counted = inventory(
        prepare("llama-3.2-1b", method=method, r=16) if method == "lora" else prepare("llama-3.2-1b", method=method)
    )
    built, architecture = counted.parameters, counted.job.architecture
    rank = holding(built, Distributed(strategy=strategy, gpus=world), architecture, autocast="bf16", upcasts=True)
    trained = sum(p.copies * p.numel for p in built.all if p.trainable)
    assert rank.states_of is not None
    masters = sum(p.numel for p in rank.states_of.all)
    assert 0 <= masters * world - trained < 2 * 2 * world
    assert [(p.name, p.numel) for p in rank.parameters.all] == [(p.name, p.numel) for p in built.all]


@pytest.mark.parametrize(
    ("strategy", "method"), [("zero1", "full"), ("zero1", "lora"), ("zero2", "full"), ("zero2", "lora"), ("zero3", "full")]
)
def test_one_rank_under_zero_is_one_gpu_in_16_bits_and_its_masters(strategy: Any, method: str) -> None:
    """2 B for each parameter; a 16-bit gradient and an fp32 master for each that trains, padded to even lengths. Under ZeRO-3
    adapters stay in fp32.
    """
    counted = inventory(prepare("llama-3.2-1b", method=method))
    built, architecture = counted.parameters, counted.job.architecture
    alone = holding(built, Distributed(strategy=strategy, gpus=1), architecture, autocast="bf16", upcasts=True)
    trained = sum(p.copies * p.numel for p in built.all if p.trainable)
    assert sum(p.copies * sum(a.nbytes for a in p.allocations) for p in alone.parameters.all) == 2 * built.num_total
    gradients, masters = (
        sum(line.bytes() for line in alone.beside if line.name.startswith(name)) for name in ("16-bit gradients", "fp32 masters")
    )
    assert 0 <= gradients - 2 * trained <= 1024
    assert 0 <= masters - 4 * trained <= 1024


@pytest.mark.parametrize("world", [2, 4, 8])
def test_parts_of_tensor_parallelism_sum_to_the_model(world: int) -> None:
    """Norms are on every rank, all else is divided evenly."""
    counted = inventory(prepare("llama-3.2-1b", method="full"))
    built, architecture = counted.parameters, counted.job.architecture
    part = holding(built, Distributed(strategy="tp", gpus=world), architecture, autocast="none", upcasts=True).parameters
    norms = sum(p.copies * p.numel for p in built.all if "norm" in p.name)
    assert world * (sum(p.copies * p.numel for p in part.all) - norms) + norms == built.num_total


@pytest.mark.parametrize("world", [2, 4])
def test_gpus_of_a_device_map_hold_the_model_between_them(world: int) -> None:
    """Each tensor is on one of them; the buffers are on all."""
    result = peftplan.estimate("llama-3.2-1b", method="full", gpus=world, strategy="device-map")
    assert result.distributed is not None
    buffers = result.static.bytes(["buffers"])
    alone = peftplan.estimate("llama-3.2-1b", method="full").persistent_bytes
    assert sum(group.persistent - buffers for group in result.distributed.ranks) == alone - buffers


@pytest.mark.parametrize("world", WORLDS)
def test_shards_sum_to_the_model_and_its_padding(world: int) -> None:
    """FSDP2 pads each tensor's first dim: less than one row per rank and tensor."""
    counted = inventory(prepare("llama-3.2-1b", method="lora", r=16))
    built, architecture = counted.parameters, counted.job.architecture
    shards = holding(built, Distributed(strategy="fsdp2", gpus=world), architecture, autocast="none", upcasts=True)
    for p, shard in zip(built.all, shards.parameters.all, strict=True):
        row = p.numel // p.shape[0]
        assert p.numel <= shard.numel * world < p.numel + world * row


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1", "tp", "device-map", "ddp"])
def test_one_rank_is_one_gpu(strategy: Any) -> None:
    """Weights and gradients; DDP has its buckets besides."""
    counted = inventory(prepare("llama-3.2-1b", method="lora", r=16))
    alone = holding(
        counted.parameters,
        Distributed(strategy=strategy, gpus=1),
        counted.job.architecture,
        autocast="bf16",
        upcasts=True,
    )
    assert bytes_of(alone.parameters) == bytes_of(counted.parameters)
    optimizer = prepare("llama-3.2-1b").setup.optim
    from peftplan.optim import parse_optim

    lines = [gradient_lines(p, parse_optim(str(optimizer))).bytes() for p in (alone.parameters, counted.parameters)]
    assert lines[0] == lines[1]


def test_ddp_does_not_depend_on_the_world() -> None:
    two, many = (estimated("ddp", world).peaks for world in (2, 64))
    assert two is not None
    assert many is not None
    assert two.by_phase == many.by_phase
    assert two.reserved == many.reserved


def test_ddp_is_one_gpu_and_its_buckets() -> None:
    """4 B for each of the 5,636,096 trained parameters."""
    alone = peftplan.estimate("llama-3.2-1b", method="lora")
    ddp = estimated("ddp", 4)
    assert ddp.persistent_bytes == alone.persistent_bytes + 4 * alone.trainable_parameters


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("fsdp2", {"offload_params": "cpu"}),
        ("fsdp1", {"offload_params": "cpu"}),
        ("zero1", {"offload_optimizer": "cpu"}),
        ("zero2", {"offload_optimizer": "cpu"}),
        ("zero3", {"offload_params": "cpu"}),
        ("zero3", {"offload_optimizer": "cpu"}),
        ("zero3", {"offload_params": "cpu", "offload_optimizer": "cpu"}),
    ],
)
def test_offloading_never_takes_more_of_the_device(strategy: str, options: dict[str, Any]) -> None:
    without, with_it = estimated(strategy, 4), estimated(strategy, 4, **options)
    assert with_it.persistent_bytes < without.persistent_bytes
    assert with_it.peaks is not None
    assert without.peaks is not None
    assert with_it.peaks.by_phase["step"] <= without.peaks.by_phase["step"]
    assert with_it.distributed is not None
    assert with_it.distributed.host_bytes > 0


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_what_lies_on_the_host_takes_nothing_of_a_block(strategy: str) -> None:
    """Nothing in the step is larger than 1 MiB: such blocks are split at 512 bytes, and have no tails. Norms on the host were
    two blocks more."""
    peaks = estimated(strategy, 4, offload_params="cpu", method="full").peaks
    assert peaks is not None
    assert "tails of unsplit blocks" not in [line.name for line in peaks.ledgers["step"].lines]


def test_uint8_storage_is_not_sharded() -> None:
    """q / 2 bytes on every rank: 973,078,528 quantized parameters of Llama-3.2-1B."""
    stored = {
        storage: peftplan.estimate("llama-3.2-1b", method="qlora", r=16, gpus=8, strategy="fsdp2", quant_storage=storage)
        for storage in ("bf16", "uint8")
    }
    difference = stored["uint8"].static.bytes(["weights"]) - stored["bf16"].static.bytes(["weights"])
    assert difference == 973_078_528 // 2 * 7 // 8


def test_peaks_fall_with_ranks_and_phases_keep_their_order() -> None:
    peaks = [estimated("fsdp2", world, method="full").peaks for world in (2, 4, 8)]
    assert all(each is not None for each in peaks)
    assert all(a.allocated > b.allocated for a, b in pairwise(peaks) if a is not None and b is not None)


def test_a_flat_parameter_of_fsdp1_has_a_gradient_if_part_of_it_trains() -> None:
    """The trace runs torch's FSDP1 on the model's own modules; rank 0's quarter of a layer is its frozen attention."""
    job: dict[str, Any] = {"method": "partial", "trainable": [r"mlp\."], "strategy": "fsdp1", "gpus": 4, "seq_len": 128}
    traced = peftplan.estimate("smollm2-135m", engine="trace", **job).peaks
    by_formula = peftplan.estimate("smollm2-135m", **job).distributed  # `static` is of another rank, whose peak is the largest
    assert traced is not None
    assert by_formula is not None
    first = by_formula.ranks[0].static
    for category in ("weights", "gradients", "optimizer_states"):
        assert first.bytes((category,)) == traced.ledgers["step"].bytes((category,))


def test_biases_that_train_in_fsdp1_without_checkpoints_have_no_reserved_bytes() -> None:
    """Rehearsed (tests/rehearse/unreserved.jsonl), with checkpoints too (tests/rehearse/methods.jsonl)."""
    job: dict[str, Any] = {"method": "lora", "bias": "all", "strategy": "fsdp1", "gpus": 4, "gradient_checkpointing": False}
    result = peftplan.estimate("qwen2.5-0.5b", **job)
    assert result.peaks is not None
    assert result.peaks.reserved is None


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp1", "zero1", "zero2", "zero3"])
def test_an_estimate_without_a_card_replays_nothing(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """The phase of a peak takes a replay of each rank, up to eight times as long as the estimate without it."""
    monkeypatch.setattr(Peaks, "phase", property(lambda peaks: pytest.fail("the peak was read")))
    peftplan.estimate("llama-3.2-1b", method="lora", gpus=8, strategy=strategy)
