"""A sweep against estimates of its points, one by one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

import peftplan
from peftplan.errors import InputError, PeftplanError, RefusedError, UnknownNameError

pytest.importorskip("numpy")

from peftplan.planning.sweep import sweep

FIXED = ("model", "method", "batch_size", "seq_len", "r", "gpu")


def test_a_sweep_says_what_it_is_before_it_runs() -> None:
    rows = sweep("llama-3.2-1b", batch_size=[1, 2], seq_len=range(512, 8193, 512), gpu=["t4", "l4"])
    assert repr(rows) == "<Sweep of batch size 2 × seq len 16 on t4, l4: 64 rows, evaluated while they are read>"
    assert repr(sweep("gpt2")) == "<Sweep of 1 point: 1 row, evaluated while they are read>"


def estimated(row: Mapping[str, Any], *options: str, **fixed: Any) -> peftplan.Estimate:
    """A direct estimate of a row."""
    named = {name: row[name] for name in (*FIXED[1:], *options) if row[name] is not None}
    return peftplan.estimate(row["model"], **named, **fixed)


def agrees(row: Mapping[str, Any], *options: str, **fixed: Any) -> None:
    """A row's numbers are those of a direct estimate."""
    result = estimated(row, *options, **fixed)
    assert result.peaks is not None
    assert row["requested_bytes"] == result.peaks.at_least
    assert row["trainable_parameters"] == result.trainable_parameters
    if row["peak_reserved"] is not None:
        assert (row["peak_allocated"], row["peak_reserved"]) == (result.peaks.allocated, result.peaks.reserved)
    if row["gpu"] is not None:
        (card,) = result.gpus
        assert row["verdict"] in (card.verdict, None)
        assert (row["usable_bytes"], row["context_bytes"]) == (card.usable_bytes, card.context_bytes)
        assert row["needed_bytes"] in (card.needed_bytes, None)
        assert row["headroom_bytes"] in (card.headroom_bytes, None)


def test_rows_are_estimates_of_their_points() -> None:
    rows = sweep(
        "qwen3-0.6b",
        method="lora,qlora,full",
        batch_size="1,2,8",
        seq_len="256:2304:512",
        r=[4, 16],
        gradient_checkpointing=[True, False],
        gpu="t4,h100",
    ).records()
    assert len(rows) == 2 * 2 * 3 * 5 * (2 + 2 + 1)
    assert {row["verdict"] for row in rows} == {"fits", "tight", "does_not_fit"}
    for row in random.Random(4).sample(rows, 40):
        agrees(row, "gradient_checkpointing")


def test_few_replays_leave_verdicts_open_and_the_others_true() -> None:
    result = sweep("llama-3.2-1b", batch_size=range(1, 17), seq_len="256:8192:256", gpu="rtx-4090", replays=40)
    rows = result.records()
    assert result.tally is not None
    assert result.tally.replayed <= 40
    assert result.tally.by.keys() == {"requested", "bound", "replay", None}
    assert [row for row in rows if (row["verdict"] is None) != (row["decided_by"] is None)] == []
    for by in ("requested", "bound", "replay", None):
        for row in random.Random(5).sample([row for row in rows if row["decided_by"] == by], 8):
            agrees(row)


def test_many_ranks_are_one_job() -> None:
    """Rank as a named size: 40 ranks of a model whose number of experts is one of them."""
    rows = sweep("mixtral-8x7b", method="qlora", r="1:40", seq_len=[512, 8192], replays=0).records()
    assert [(row["r"], row["seq_len"]) for row in rows] == [(r, seq_len) for seq_len in (512, 8192) for r in range(1, 41)]
    for row in random.Random(6).sample(rows, 12):
        agrees(row)


def test_a_card_with_other_kernels_has_its_own_bytes() -> None:
    by_card = {row["gpu"]: row for row in sweep("gpt2", seq_len=[512, 1024], gpu="t4,h100").records()}
    assert by_card["t4"]["requested_bytes"] != by_card["h100-80gb"]["requested_bytes"]
    for row in by_card.values():
        agrees(row)


def test_cards_that_refuse_a_job() -> None:
    (row, _) = sweep("gpt2", seq_len=[512, 1024], gpu="t4", attn_implementation="flash_attention_2").records()
    assert row["verdict"] == "does_not_run"


def test_what_is_refused_is_a_row_with_the_reason() -> None:
    rows = sweep("gpt2", seq_len=[512, 2048], method="lora,full", quant=["none", "nf4"]).records()
    assert len(rows) == 8
    reasons = {(row["method"], row["quant"], row["seq_len"]): row["error"] for row in rows}
    assert [at for at, error in reasons.items() if error is None] == [
        ("lora", "none", 512),
        ("lora", "nf4", 512),
        ("full", "none", 512),
    ]
    assert "up to 1024" in str(reasons["lora", "none", 2048])


def test_options_that_take_lists_and_several_models() -> None:
    rows = sweep("gpt2,gpt2-medium", target_modules=[["c_attn"], ["c_attn", "c_proj"]]).records()
    assert [(row["model"], row["target_modules"]) for row in rows] == [
        (model, names) for model in ("gpt2", "gpt2-medium") for names in (["c_attn"], ["c_attn", "c_proj"])
    ]
    agrees(rows[1], "target_modules")


def test_memory_is_bounded_by_a_block() -> None:
    """A thousand million points are begun and left: nothing of the grid is written out."""
    result = sweep("gpt2", batch_size="1:1000000", seq_len="1:1000", most_rows=None, replays=0)
    assert result.num_rows == 10**9
    chunk = next(result.chunks())
    assert (chunk["batch_size"][0], chunk["seq_len"][:3]) == (1, [1, 2, 3])


def test_pandas_takes_the_rows() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(sweep("gpt2", batch_size=[1, 2], gpu="t4"))
    assert list(frame["verdict"]) == ["fits", "fits"]
    assert frame["needed_bytes"].dtype == "int64"


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        (
            {"seq_len": "1:1000", "batch_size": "1:1000", "r": "1:1000"},
            RefusedError,
            "batch size 1,000 × r 1,000 = 1,000,000,000 rows",
        ),
        ({"seq_len": "512:256"}, InputError, "seq_len: '512:256'"),
        ({"batch_size": [0, 1]}, InputError, "batch_size must be at least 1"),
        ({"batch_size": ["a", 1]}, InputError, "batch_size: 'a'"),
        ({"batch_size": [2**40, 1]}, InputError, "batch_size must be at most"),
        ({"nosuch": [1, 2]}, InputError, "nosuch is not an option of lora"),
        ({"method": "lora,lorra"}, UnknownNameError, "did you mean lora"),
        ({"quant": ["nf4", "nf5"]}, UnknownNameError, "did you mean nf4"),
        ({"dtype": ["bf16", "bf17"]}, UnknownNameError, "did you mean bf16"),
        ({"optim": "adamw_torch,adamm"}, UnknownNameError, "adamm"),
        ({"gpu": ["l4", "l5"]}, UnknownNameError, "l5"),
        ({"replays": -1}, InputError, "replays"),
        ({"seq_len": [4096, 8192]}, InputError, "up to 1024"),
        ({"method": "full", "quant": ["nf4", "int8"]}, PeftplanError, "cannot be trained in full"),
    ],
)
def test_bad_input_says_what_is_accepted(options: dict[str, Any], error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected):
        sweep("gpt2", **options).records()


def test_text_only_is_said_of_a_vision_language_model() -> None:
    for model, warned in (("Qwen/Qwen2-VL-2B-Instruct", True), ("llama-3.2-1b", False)):
        result = sweep(model, target_modules="q_proj", seq_len=(64,), gpu="l4")
        assert [row["verdict"] for row in result] == ["fits"]
        assert any(warning.startswith("the batch is text only") for warning in result.warnings) is warned
