"""Which modules transformers places on which GPU, against transformers' own function and a rehearsed program."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.distributed.device_map import blocks_of, on_devices, placed
from peftplan.job.inventory import inventory
from peftplan.job.lines import weight_lines
from peftplan.job.prepare import prepare
from peftplan.report import comparing, fitting
from peftplan.report.screen import UNICODE


def test_a_gpu_leaves_room_for_what_is_to_come() -> None:
    """An embedding of 4 and six layers of 3 on two GPUs: 22 // 2 + 1.25 x 4 = 16, of which the first keeps 3 free: 4 + 3 x 3."""
    assert placed([4, 3, 3, 3, 3, 3, 3], 2) == [0, 0, 0, 0, 1, 1, 1]


def test_a_rehearsed_program() -> None:
    """Llama-3.2-3B with LoRA of rank 16 on two GPUs: what `load` held on each (torch 2.13, transformers 5.24), with buffers and
    tails of blocks beside the weights, within 0.01 %.
    """
    built = inventory(prepare("llama-3.2-3b", method="lora", r=16)).parameters
    weights = [weight_lines(share.parameters).bytes() for share in on_devices(built, 2)]
    assert weights == pytest.approx([3_860_353_024, 2_662_730_752], rel=1e-4)


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "mistral-7b-v0.1", "qwen3-0.6b", "gemma-2-2b", "pythia-1b", "gpt2"])
def test_transformers_places_them_so(name: str, devices: int) -> None:
    """`infer_auto_device_map` with the balanced memory of cards of 10 TB, on the meta device."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.accelerate import _get_device_map

    from peftplan.arch.catalogue import find

    entry = find(name)
    assert entry is not None
    config = transformers.AutoConfig.for_model(**entry.facts()["config"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    theirs = _get_device_map(model, "balanced", dict.fromkeys(range(devices), 10 * 2**40), None)
    blocks = blocks_of(inventory(prepare(name, method="full")).parameters)
    ours = placed([block.nbytes for block in blocks], devices)
    for block, place in zip(blocks, ours, strict=True):
        module = block.parameters[0].name.rpartition(".")[0].replace("{}", str(block.layer))
        at = next(device for prefix, device in theirs.items() if not prefix or f"{module}.".startswith(f"{prefix}."))
        assert at == place, (module, theirs)


def test_the_first_gpu_stays_empty_where_a_head_is_to_come() -> None:
    """12 layers of Llama 3.1 8B in 4 bits over four GPUs, rehearsed: `load` took 7,680 bytes on the first one, 2.06 and 1.60 GB
    on the next two, 512 on the last. In MB: 0.9 x ((2 x 1,050 + 12 x 109) / 4 + 1.25 x 1,050) = 1,949; less the head 899.
    """
    assert placed([1050, *[109] * 12, 1050], 4, share=0.9) == [*[1] * 9, *[2] * 5]
    result = peftplan.estimate("llama-3.1-8b", method="qlora", gpus=4, strategy="device-map")
    assert result.peaks is None
    assert "leaves the first one empty" in result.not_modelled[0]


def test_numbers_are_those_of_the_gpu_that_needs_most() -> None:
    """An untied head is on the last GPU, with the logits: there the peak is. The first one has the table and a copy of them."""
    result = peftplan.estimate("llama-3.1-8b", method="lora", r=16, gpus=2, strategy="device-map", gpu="l4")
    assert result.distributed is not None
    first, last = (group.peaks for group in result.distributed.ranks)
    assert result.peaks is not None
    assert first is not None
    assert last is not None
    assert last.allocated > first.allocated
    assert result.peaks.allocated == last.allocated
    assert result.peaks.reserved == last.reserved
    assert result.distributed.ranks[1].persistent == result.static.bytes()
    assert result.distributed.words.startswith("device_map over 2 GPUs: bytes of the GPU that needs most")


def test_one_process_has_no_ranks_in_its_words() -> None:
    """A comparison and a fit said `per rank`."""
    compared = peftplan.compare("llama-3.2-1b", methods=["lora"], gpus=2, strategy="device-map")
    assert comparing.heading(compared) == "llama-3.2-1b: 1 method, device_map over 2 GPUs, per GPU"
    planned = peftplan.fit("llama-3.2-1b", gpu="l4", gpus=2, method="lora", strategy="device-map")
    assert "lora over 2 GPUs (device-map), per GPU: fits up to" in fitting.headline(planned, UNICODE)


def test_logits_come_back_to_the_first_gpu() -> None:
    """2,048 tokens x 128,256 words in 16 bits, and accelerate's copy of them in fp32."""
    result = peftplan.estimate("llama-3.1-8b", method="lora", r=16, gpus=2, strategy="device-map")
    assert result.distributed is not None
    first = result.distributed.ranks[0].peaks
    assert first is not None
    lasting = result.distributed.ranks[0].persistent
    logits = 2048 * 128_256 * (2 + 4)
    assert first.by_phase["forward"] - lasting >= logits


def test_more_gpus_hold_less() -> None:
    sizes = [peftplan.estimate("mistral-7b-v0.3", method="lora", gpus=n, strategy="device-map").peaks for n in (2, 4, 8)]
    needed = [peaks.allocated for peaks in sizes if peaks is not None]
    assert needed == sorted(needed, reverse=True)
    assert len(needed) == 3


def test_one_process_has_no_buffers_of_nccl() -> None:
    estimate = peftplan.estimate("llama-3.2-1b", gpu="2xl4", strategy="device-map")
    assert not any("NCCL" in text for text in estimate.to_dict()["not_modelled"])


def test_all_on_one_gpu_has_no_peak() -> None:
    """In 4 bits the embedding of Llama 3.2 1B is half of it: transformers places all on the first GPU, and Trainer copies it."""
    result = peftplan.estimate("llama-3.2-1b", method="qlora", gpus=2, strategy="device-map")
    assert result.peaks is None
    assert "places all on one" in result.not_modelled[0]


@pytest.mark.parametrize("strategy", ["device-map", "tp"])
def test_many_sizes_at_once_are_each_one_alone(strategy: Any) -> None:
    """Of a `device_map` it is the GPU that needs most at each size."""
    pytest.importorskip("numpy")
    options: dict[str, Any] = {"method": "lora", "gpus": 2, "strategy": strategy, "target_modules": "q_proj,v_proj"}
    rows = [*peftplan.sweep("llama-3.2-1b", seq_len=[128, 2048], r=[8, 64], **options)]
    assert len(rows) == 4
    for row in rows:
        alone = peftplan.estimate("llama-3.2-1b", seq_len=row["seq_len"], r=row["r"], **options).peaks
        assert alone is not None
        assert (row["peak_allocated"], row["peak_reserved"]) == (alone.allocated, alone.reserved)
