"""Verdicts at their edges, by hand: 1 GiB = 1,073,741,824 bytes, of which 5 % are 53,687,091.2."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from peftplan import estimate
from peftplan.errors import InputError
from peftplan.hardware.gpus import find_gpu
from peftplan.ledger import Ledger, Line
from peftplan.planning.verdicts import all_fit, verdict
from peftplan.results.peaks import PHASES, Peaks
from tests.cli.run import run
from tools.rank_grid import cut

ALIVE = Ledger((Line("w", "weights", "uint8", (512,), 1, "by hand"),))


CARD = find_gpu("1GiB")._replace(context_mib=0)


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
    on_card = verdict(CARD, 512, peaks(reserved))
    assert (on_card.headroom_bytes, on_card.verdict) == (left, word)


def test_an_incomplete_peak_is_a_lower_bound() -> None:
    assert verdict(CARD, 512, peaks(2**20, "a value")).verdict == "unknown"
    assert verdict(CARD, 512, peaks(2**31, "a value")).verdict == "does_not_fit"


def test_without_a_peak_only_a_shortfall_is_certain() -> None:
    assert verdict(CARD, 2**30, None).verdict == "unknown"
    assert verdict(CARD, 2**30 + 512, None).verdict == "does_not_fit"


def test_a_known_context_is_taken_off() -> None:
    # T4: CUDA reports 14,912 MiB, and a training process held a context of 140.875 MiB = 147,718,144 bytes
    on_card = verdict(find_gpu("t4"), 512, peaks(10**9))
    assert on_card.headroom_bytes == 14_912 * 2**20 - 10**9 - 147_718_144
    assert (on_card.needed_bytes, on_card.context_bytes) == (10**9 + 147_718_144, 147_718_144)
    assert (on_card.runtime_context, on_card.device_total) == (147_718_144, 1_147_718_144)


def test_each_card_is_judged_with_its_own_kernels() -> None:
    # no flash kernel before compute capability 8.0, so attention of fp32 inputs keeps s × s there
    alone = {name: estimate("llama-2-7b", method="qlora", gpu=name).gpus[0] for name in ("t4", "a100-80gb")}
    assert alone["t4"].needed_bytes > alone["a100-80gb"].needed_bytes
    for names in (("t4", "a100-80gb"), ("a100-80gb", "t4")):
        together = estimate("llama-2-7b", method="qlora", gpu=",".join(names))
        assert together.gpus == tuple(alone[name] for name in names)
        assert together.peaks == estimate("llama-2-7b", method="qlora", gpu=names[0]).peaks


def test_verdicts_subtract_what_they_show() -> None:
    for on_card in estimate("llama-2-70b", method="qlora", gpu="t4,a100-80gb,24GiB,h100-80gb").gpus:
        assert on_card.headroom_bytes == on_card.usable_bytes - on_card.needed_bytes


@pytest.mark.parametrize(
    ("gpu", "options", "expected"),
    [
        ("t4", {}, "t4: no bf16 in hardware: torch emulates it, slowly (--dtype fp16 --autocast fp16)"),
        ("t4", {"method": "full"}, "slowly (--dtype fp32 --autocast fp16)"),
        ("t4", {"method": "bitfit", "model": "gpt2"}, "slowly (--dtype fp32 --autocast fp16)"),
        ("t4", {"method": "ln-tuning"}, "slowly (--dtype fp32 --autocast fp16)"),
        ("t4", {"modules_to_save": ["lm_head"]}, "slowly (--dtype"),
        ("t4", {"adapter_dtype": "bf16"}, "emulates it, slowly"),
        ("t4", {"dtype": "fp16", "autocast": "fp16"}, None),
        ("a100-80gb", {}, None),
        ("a100-80gb", {"quant": "fp8"}, "fp8 needs compute capability 8.9"),
        ("mi300x", {}, "counted with the kernels of CUDA's compute capability 8.0"),
        (
            "a100-80gb",
            {"trainer": "automodel", "method": "full", "kernels": "te"},
            "packed documents from compute capability 9.0 on",
        ),
        ("h100-80gb", {"trainer": "automodel", "method": "full", "kernels": "te"}, None),
        ("24GiB", {}, None),
    ],
)
def test_what_a_card_does_otherwise_is_said(gpu: str, options: dict[str, Any], expected: str | None) -> None:
    job = {"model": "llama-2-7b", "gpu": gpu, **options}
    notes = [note for note in estimate(**job).assumptions["notes"] if note.startswith(gpu)]
    assert [note for note in notes if expected is None or expected not in note] == []
    assert bool(notes) == (expected is not None)
    for note in notes:
        if named := re.search(r"--dtype (\w+) --autocast (\w+)", note):
            assert estimate(**job | {"dtype": named[1], "autocast": named[2]}).peaks is not None


IN_8_BITS: dict[str, Any] = {
    "method": "full",
    "trainer": "automodel",
    "strategy": "fsdp2",
    "gpus": 8,
    "ep_size": 8,
    "seq_len": 2048,
    "loss": "full-no-upcast",
    "optim": "adam_one_by_one",
}


@pytest.mark.parametrize(
    ("card", "kernels", "verdict", "counted"),
    [
        ("h100-80gb", "te-norm,hybridep,te-linear,te-mxfp8,balanced", "does_not_run", True),
        ("rtx-5090", "te-norm,hybridep,te-linear,te-mxfp8,balanced", "does_not_run", True),
        ("b200", "te-norm,hybridep,te-linear,te-mxfp8,balanced", "fits", True),
        ("180GiB", "te-norm,hybridep,te-linear,te-mxfp8,balanced", "fits", True),  # of a card that is not named
        ("a100-80gb", "te-norm,deepep,te-linear,te-fp8-blocks,balanced", "does_not_run", True),
        ("h200", "te-norm,deepep,te-linear,te-fp8-blocks,balanced", "fits", True),
        ("b200", "te-norm,deepep,te-linear,te-fp8-blocks,balanced", "unknown", False),  # scales of MXFP8
    ],
)
def test_transformer_engine_computes_in_8_bits_on_some_cards(card: str, kernels: str, verdict: str, counted: bool) -> None:
    """transformer-engine 2.20.2, pytorch/quantization.py (`check_mxfp8_support`, `check_fp8_block_scaling_support`)."""
    model = cut("qwen3-30b-a3b", 3)
    job = IN_8_BITS | {"model": model, "kernels": kernels, "gradient_checkpointing": "mxfp8" in kernels}
    result = estimate(**job, gpu=card)
    assert result.gpus[0].verdict == verdict
    assert (result.peaks is not None) is counted


@pytest.mark.parametrize(
    ("cards", "options", "expected"),
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
def test_attention_that_may_be_cudnns_is_said_wherever_a_card_prefers_it(
    cards: str, options: dict[str, str], expected: bool
) -> None:
    result = estimate("llama-3.2-1b", gpu=cards, **options)
    assert any("cuDNN" in what for what in result.not_modelled) is expected


QWEN = {"model": "qwen3-8b", "r": 16}


@pytest.mark.parametrize(
    ("seq_len", "context", "word", "gib"),
    [
        # 79.18 GiB usable, of which 5 % are 3.96; Hopper's contexts are not known: 828 MiB = 0.81 GiB
        (24000, None, "fits", 4.79),
        (24000, 0, "fits", 5.60),
        (26496, None, "does_not_fit", -1.18),
        (26496, 0, "tight", -0.37),
        (26560, None, "does_not_fit", -1.34),
        (26560, 0, "does_not_fit", -0.53),
    ],
)
def test_needed_is_what_is_reserved_whatever_the_verdict(seq_len: int, context: int | None, word: str, gib: float) -> None:
    result = estimate(**QWEN, gpu="h100", seq_len=seq_len, context=context)
    (on_card,) = result.gpus
    assert (on_card.verdict, round(on_card.headroom_bytes / 2**30, 2)) == (word, gib)
    peaks = result.peaks
    assert peaks is not None
    assert on_card.needed_bytes == (peaks.reserved or 0) + (828 * 2**20 if context is None else 0)


def test_what_runs_only_without_its_cache_is_tight_with_negative_headroom() -> None:
    (on_card,) = estimate(**QWEN, gpu="h100", seq_len=26048).gpus
    assert (on_card.verdict, on_card.runs_by_releasing_cache) == ("tight", True)
    assert on_card.headroom_bytes < 0
    assert on_card.to_dict()["runs_by_releasing_cache"] is True
    assert "releases cached memory" in on_card.words
    (enough,) = estimate(**QWEN, gpu="h100", seq_len=24000).gpus
    assert (enough.runs_by_releasing_cache, enough.words) == (False, "fits")


@pytest.mark.parametrize(("runs", "word"), [(True, "tight"), (False, "does_not_fit")])
def test_a_replay_with_what_is_usable_less_the_context_decides(runs: bool, word: str) -> None:
    capacities: list[int] = []

    def runs_within(capacity: int) -> bool:
        capacities.append(capacity)
        return runs

    more = peaks(2**30 - 2**20 + 1)
    on_card = verdict(CARD._replace(context_mib=1), 512, more, runs_within)
    assert (on_card.verdict, on_card.headroom_bytes, on_card.runs_by_releasing_cache) == (word, -1, runs)
    assert capacities == [2**30 - 2**20]


def test_an_incomplete_peak_that_runs_with_less_is_unknown() -> None:
    on_card = verdict(CARD, 512, peaks(2**30 + 1, "a value"), lambda capacity: True)
    assert (on_card.verdict, on_card.runs_by_releasing_cache, on_card.lower_bound) == ("unknown", False, True)
    assert (on_card.runtime_context, on_card.device_total) == (0, None)


def test_a_context_of_another_card_is_assumed_and_said() -> None:
    (on_card,) = estimate("smollm2-135m", method="full", seq_len=256, batch_size=122, gpu="l4").gpus
    # Without a context 9 MiB were left; the largest of an Ada card, the RTX 4090's, is 428 MiB.
    assert (on_card.verdict, on_card.context_assumed, on_card.context_bytes) == ("does_not_fit", True, 428 * 2**20)
    assert on_card.headroom_bytes == estimated_without_context() - 428 * 2**20
    assert (on_card.runtime_context, on_card.device_total) == (None, None)
    assert "assumed: 428 MiB" in on_card.context_source
    assert "rtx-4090" in on_card.context_source


def estimated_without_context() -> int:
    (on_card,) = estimate("smollm2-135m", method="full", seq_len=256, batch_size=122, gpu="l4", context=0).gpus
    assert on_card.verdict == "tight"
    assert 0 < on_card.headroom_bytes < 10 * 2**20
    assert (on_card.context_assumed, on_card.runtime_context) == (False, 0)
    return on_card.headroom_bytes


@pytest.mark.parametrize("context", [-1, "much", "nan", "inf", True, 2**21, [1]])
def test_a_context_that_is_no_size_is_refused(context: object) -> None:
    with pytest.raises(InputError, match=r"context: .* MiB of CUDA context"):
        estimate("gpt2", gpu="t4", context=context)  # type: ignore[arg-type]


def test_a_context_of_the_user_replaces_a_known_one() -> None:
    known, other = (estimate("gpt2", gpu="t4", context=mib).gpus[0] for mib in (None, 300.5))
    assert other.needed_bytes - known.needed_bytes == int(300.5 * 2**20) - 147_718_144
    assert (other.context_source, other.context_assumed) == ("as given", False)


def test_a_card_named_twice_is_judged_once() -> None:
    names = [verdict.gpu for verdict in estimate("gpt2", gpu=["h100,t4", "h100-80gb", "T4", *["h100"] * 51]).gpus]
    assert names == ["h100-80gb", "t4"]
    sizes = estimate("gpt2", gpu="24GB,24GiB,24G,24 gib,24576MiB,24gb")
    assert [verdict.gpu for verdict in sizes.gpus] == ["24GB", "24GiB"]
    assert [note for note in sizes.assumptions["notes"] if "sold as 24 GB" in note and note.startswith("24GB: ")]


@pytest.mark.parametrize(
    ("gpu", "options", "raises"),
    [
        ("t4", {"attn_implementation": "flash_attention_2"}, "flash_api.cpp"),
        ("v100-16gb", {"attn_implementation": "flash_attention_2"}, "flash_api.cpp"),
        ("tesla-p40", {"optim": "adamw_torch_8bit"}, "_inductor/scheduler.py"),
        ("tesla-p40", {"optim": "adamw_torch_4bit"}, "_inductor/scheduler.py"),
        ("a100-80gb", {"attn_implementation": "flash_attention_2"}, None),
        ("v100-16gb", {"optim": "adamw_torch_8bit"}, None),
        ("mi300x", {"attn_implementation": "flash_attention_2"}, None),
        ("80GiB", {"attn_implementation": "flash_attention_2"}, None),
        ("t4", {}, None),
        ("t4", {"quant": "int8"}, None),
        ("tesla-p40", {"dtype": "bf16"}, None),
    ],
)
def test_a_job_does_not_run_only_where_a_library_raises(gpu: str, options: dict[str, str], raises: str | None) -> None:
    (on_card,) = estimate("llama-3.2-1b", gpu=gpu, **options).gpus
    if raises is None:
        assert (on_card.verdict, on_card.reason) == ("fits", None)
    else:
        assert on_card.verdict == "does_not_run"
        assert raises in str(on_card.reason)
    assert on_card.to_dict()["reason"] == on_card.reason


def test_what_is_slower_or_different_on_a_card_keeps_its_verdict() -> None:
    result = estimate("llama-3.2-1b", gpu="t4")
    assert result.gpus[0].verdict == "fits"
    assert any("no bf16 in hardware" in note for note in result.assumptions["notes"])


def test_the_line_of_torch_that_refuses_old_cards_is_there() -> None:
    from importlib.util import find_spec
    from pathlib import Path

    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        pytest.skip("needs torch")
    text = (Path(torch.origin).parent / "_inductor" / "scheduler.py").read_text(encoding="utf-8")
    body = text[text.index("def create_backend") :]
    assert re.search(r"major < 7\s+\):\s+raise GPUTooOldForTriton", body[:2000])


def test_a_card_beside_others_needs_what_it_needs_alone() -> None:
    """The three run the same kernels; the buffers of sums over rows differ with their multiprocessors (`hardware.processors`)."""
    cards = ("a100-80gb", "rtx-4090", "rtx-3090")

    def needed(*gpus: str) -> list[int | None]:
        job = estimate("bert-base-uncased", method="full", task_type="SEQ_CLS", batch_size=32, seq_len=256, gpu=gpus)
        return [on_card.needed_bytes for on_card in job.gpus]

    alone = [needed(card)[0] for card in cards]
    assert needed(*cards) == alone
    assert needed(*reversed(cards)) == alone[::-1]


def test_python_and_json_say_the_same_of_every_card() -> None:
    # 38.2 GiB are reserved: of the 39.6 GiB of an A100 less than 5 % are left, and flash-attn has no kernel for a T4
    options = {"seq_len": 9216, "attn_implementation": "flash_attention_2"}
    judged = estimate(**QWEN, gpu="t4,a100,h100", **options)
    job = ("qwen3-8b", "--r", "16", "--seq-len", "9216", "--attn-implementation", "flash_attention_2", "--gpu", "t4,a100,h100")
    cards = json.loads(run("estimate", *job, "--format", "json").out)["gpus"]
    assert (
        [card["verdict"] for card in cards] == [verdict.verdict for verdict in judged.gpus] == ["does_not_run", "tight", "fits"]
    )
    for card, on_card in zip(cards, judged.gpus, strict=True):
        assert on_card.to_dict().items() <= card.items()
        assert card["needed_bytes"] + card["headroom_bytes"] == card["usable_bytes"]


@pytest.mark.parametrize(
    ("words", "allow_tight", "text_only", "accepted"),
    [
        (("fits", "fits"), False, False, True),
        (("fits", "tight"), False, False, False),
        (("fits", "tight"), True, False, True),
        (("tight", "does_not_fit"), True, False, False),
        (("fits", "unknown"), True, True, False),
        (("fits", "does_not_run"), True, True, False),
    ],
)
def test_every_card_must_be_accepted(words: tuple[str, ...], allow_tight: bool, text_only: bool, accepted: bool) -> None:
    judged = verdict(CARD, 512, peaks(2**20))
    cards = [judged._replace(verdict=word) for word in words]
    assert all_fit(cards, allow_tight=allow_tight, text_only=text_only) is accepted


def test_a_verdict_for_text_alone_is_accepted_only_as_such() -> None:
    text = verdict(CARD, 512, replace(peaks(2**20), assumed={"images_per_sample": 0}))
    assert (text.verdict, text.words, text.to_dict()["scope"]) == ("fits", "fits, text only", "text")
    assert not all_fit([text])
    assert all_fit([text], text_only=True)
    pictures = verdict(CARD, 512, replace(peaks(2**20), assumed={"images_per_sample": 1}))
    assert (pictures.words, "scope" in pictures.to_dict()) == ("fits", False)
