"""Verdicts at their edges, by hand: 1 GiB = 1,073,741,824 bytes, of which 5 % are 53,687,091.2."""

from __future__ import annotations

import pytest

from peftplan import estimate
from peftplan.hardware.gpus import find_gpu
from peftplan.memory.ledger import Ledger, Line
from peftplan.planning.result import PHASES, Peaks
from peftplan.planning.verdicts import verdict

ALIVE = Ledger((Line("w", "weights", "uint8", (512,), 1, "by hand"),))


def peaks(reserved: int, *incomplete: str) -> Peaks:
    return Peaks(dict.fromkeys(PHASES, ALIVE), reserved, "by hand", incomplete)


@pytest.mark.parametrize(
    ("reserved", "left", "word"),
    [
        (1_020_054_732, 53_687_092, "fits"),
        (1_020_054_733, 53_687_091, "tight"),
        (1_073_741_824, 0, "tight"),
        (1_073_741_825, -1, "does_not_fit"),
    ],
)
def test_a_peak_against_a_capacity(reserved: int, left: int, word: str) -> None:
    found = verdict(find_gpu("1GiB"), 512, peaks(reserved), context_mib=0)
    assert (found.headroom_bytes, found.verdict) == (left, word)


def test_an_incomplete_peak_is_a_lower_bound() -> None:
    assert verdict(find_gpu("1GiB"), 512, peaks(2**20, "a value"), context_mib=0).verdict == "unknown"
    assert verdict(find_gpu("1GiB"), 512, peaks(2**31, "a value"), context_mib=0).verdict == "does_not_fit"


def test_without_a_peak_only_a_shortfall_is_certain() -> None:
    assert verdict(find_gpu("1GiB"), 2**30, None, context_mib=0).verdict == "unknown"
    assert verdict(find_gpu("1GiB"), 2**30 + 512, None, context_mib=0).verdict == "does_not_fit"


def test_a_known_context_is_taken_off() -> None:
    # T4: CUDA reports 14,912 MiB, and a training process held a context of 140.875 MiB = 147,718,144 bytes
    found = verdict(find_gpu("t4"), 512, peaks(10**9))
    assert found.headroom_bytes == 14_912 * 2**20 - 10**9 - 147_718_144
    assert (found.needed_bytes, found.context_bytes) == (10**9 + 147_718_144, 147_718_144)
    assert (found.runtime_context, found.device_total) == (147_718_144, 1_147_718_144)


def test_each_card_is_judged_with_its_own_kernels() -> None:
    # no flash kernel before compute capability 8.0, so attention of fp32 inputs keeps s × s there
    alone = {name: estimate("llama-2-7b", method="qlora", gpu=name).gpus[0] for name in ("t4", "a100-80gb")}
    assert alone["t4"].needed_bytes > alone["a100-80gb"].needed_bytes
    for names in (("t4", "a100-80gb"), ("a100-80gb", "t4")):
        together = estimate("llama-2-7b", method="qlora", gpu=",".join(names))
        assert together.gpus == tuple(alone[name] for name in names)
        assert together.peaks == estimate("llama-2-7b", method="qlora", gpu=names[0]).peaks


def test_verdicts_subtract_what_they_show() -> None:
    for found in estimate("llama-2-70b", method="qlora", gpu="t4,a100-80gb,24GiB,h100-80gb").gpus:
        assert found.headroom_bytes == found.usable_bytes - found.needed_bytes


@pytest.mark.parametrize(
    ("gpu", "options", "said"),
    [
        ("t4", {}, "t4: no bf16 in hardware"),
        ("t4", {"dtype": "fp16", "autocast": "fp16"}, None),
        ("a100-80gb", {}, None),
        (
            "t4",
            {"attn_implementation": "flash_attention_2", "dtype": "fp16", "autocast": "fp16"},
            "flash_attention_2 does not run",
        ),
        ("a100-80gb", {"quant": "fp8"}, "fp8 needs compute capability 8.9"),
        ("mi300x", {}, "counted with the kernels of CUDA's compute capability 8.0"),
        ("24GiB", {}, None),
    ],
)
def test_what_a_card_does_otherwise_is_said(gpu: str, options: dict[str, str], said: str | None) -> None:
    notes = [note for note in estimate("llama-2-7b", gpu=gpu, **options).assumptions["notes"] if note.startswith(gpu)]
    assert [note for note in notes if said is None or said not in note] == []
    assert bool(notes) == (said is not None)


@pytest.mark.parametrize(
    ("cards", "options", "said"),
    [
        ("h100-80gb", {}, True),
        ("a100-80gb", {}, False),
        ("a100-80gb,b200", {}, True),
        ("b300", {}, False),  # 10.3: torch asks for a minor version of 0 (sdp_utils.cpp, check_prefer_cudnn_attention)
        ("h100-80gb", {"attn_implementation": "eager"}, False),
        ("h100-80gb", {"dtype": "fp32", "autocast": "none"}, False),
        ("h100-80gb", {"dtype": "fp32"}, True),  # autocast bf16
    ],
)
def test_attention_that_may_be_cudnns_is_said_wherever_a_card_prefers_it(cards: str, options: dict[str, str], said: bool) -> None:
    found = estimate("llama-3.2-1b", gpu=cards, **options)
    assert any("cuDNN" in what for what in found.not_modelled) is said
