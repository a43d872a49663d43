"""`Estimate.at` for every size: numbers, lists and arrays, against estimates made anew."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import peftplan
from peftplan.errors import InputError, RefusedError

np = pytest.importorskip("numpy")


def test_a_number_of_any_size_is_an_estimate() -> None:
    base = peftplan.estimate("qwen3-0.6b", method="lora", gpu="t4")
    for sizes in (
        {"r": 32},
        {"r": 4, "seq_len": 512},
        {"gradient_accumulation_steps": 4},
        {"batch_size": 2, "logits_to_keep": 8},
    ):
        assert base.at(**sizes).to_dict() == peftplan.estimate("qwen3-0.6b", method="lora", gpu="t4", **sizes).to_dict()


def test_lists_and_arrays_are_broadcast() -> None:
    base = peftplan.estimate("qwen3-0.6b", method="lora", gpu=("t4", "h100"))
    grid = base.at(batch_size=np.array([1, 8])[:, None], seq_len=[512, 4096], r=np.array([8, 64])[:, None, None])
    assert grid.sizes.keys() == {"batch_size", "seq_len", "r"}
    assert grid.peak_requested_bytes.shape == (2, 2, 2)
    assert not grid.reserved_bytes.mask[grid.verdicts["t4"] == "fits"].any()
    for at in np.ndindex(2, 2, 2):
        sizes = {name: int(values[at]) for name, values in grid.sizes.items()}
        one = peftplan.estimate("qwen3-0.6b", method="lora", gpu=("t4", "h100"), **sizes)
        assert one.peaks is not None
        assert grid.peak_requested_bytes[at] == one.peaks.at_least
        assert [grid.verdicts[card.gpu][at] for card in one.gpus] == [card.verdict for card in one.gpus]
        if grid.reserved_bytes[at] is not np.ma.masked:
            assert (grid.allocated_bytes[at], grid.reserved_bytes[at]) == (one.peaks.allocated, one.peaks.reserved)


def test_few_replays_leave_verdicts_open() -> None:
    base = peftplan.estimate("llama-3.2-1b", gpu="rtx-4090")
    grid = base.at(batch_size=np.arange(1, 17)[:, None], seq_len=np.arange(256, 8193, 256), replays=20)
    words, by = grid.verdicts["rtx-4090"], grid.decided_by["rtx-4090"]
    assert set(by.ravel()) == {"requested", "bound", "replay", None}
    assert (~grid.reserved_bytes.mask).sum() <= 20
    assert [word for word, how in zip(words.ravel(), by.ravel(), strict=True) if (word is None) != (how is None)] == []
    for how in ("requested", "bound", "replay"):
        at = tuple(np.argwhere(by == how)[-1])
        assert words[at] == base.at(batch_size=int(grid.batch_size[at]), seq_len=int(grid.seq_len[at])).gpus[0].verdict


def test_other_sizes_are_made_ready_for_each_value() -> None:
    grid = peftplan.estimate("gpt2", method="prompt-tuning", num_virtual_tokens=4).at(
        num_virtual_tokens=[4, 20, 4], seq_len=[64, 64, 512]
    )
    for at, (tokens, seq_len) in enumerate(((4, 64), (20, 64), (4, 512))):
        one = peftplan.estimate("gpt2", method="prompt-tuning", num_virtual_tokens=tokens, seq_len=seq_len).peaks
        assert one is not None
        assert (grid.peak_requested_bytes[at], grid.reserved_bytes[at]) == (one.at_least, one.reserved)
    assert pickle.loads(pickle.dumps(grid)) == grid


@pytest.mark.parametrize(
    "sizes",
    [{"seq_len": [0, 1]}, {"batch_size": [1.5]}, {"batch_size": []}, {"seq_len": [512, 2048]}, {"r": [0, 8]}, {"nosuch": [1, 2]}],
)
def test_bad_sizes_are_one_line(sizes: dict[str, list[int]]) -> None:
    with pytest.raises(InputError):
        peftplan.estimate("gpt2").at(**sizes)


def test_at_other_sizes_another_rank_may_need_the_most() -> None:
    """Those of ZeRO-2 hold unlike gradients when backward is at its peak."""
    job: dict[str, Any] = {"method": "full", "gpus": 8, "strategy": "zero2", "gpu": "h100"}
    long = peftplan.estimate("llama-3.2-1b", **job, batch_size=32, seq_len=4096)
    short = peftplan.estimate("llama-3.2-1b", **job, batch_size=1, seq_len=128)
    assert long.at(batch_size=1, seq_len=128).to_dict() == short.to_dict()
    grid = long.at(batch_size=[1, 32], seq_len=[128, 4096])
    assert grid.peak_requested_bytes.tolist() == [short.peaks.at_least, long.peaks.at_least]  # type: ignore[union-attr]


def test_a_job_without_a_peak_says_what_has_no_formula() -> None:
    job = peftplan.estimate("t5-small", method="lora", strategy="fsdp1", gpus=2)
    with pytest.raises(InputError, match=r"^engine: analytic states no peak for this job: a step with FSDP1 .*no formula"):
        job.at(batch_size=2)


def test_arrays_whose_shapes_do_not_agree_are_named() -> None:
    with pytest.raises(RefusedError, match=r"batch_size has 2, seq_len has 3"):
        peftplan.estimate("gpt2").at(batch_size=[1, 2], seq_len=[128, 256, 512])
