"""Gemma 4 that torch compiles for Unsloth layer by layer: rehearsals of its own loading and training, without pictures.

unsloth and unsloth_zoo 2026.10.9, trl 1.15.0, torch 2.13.0 on an emulated A100, adamw_8bit. Each row: peaks of forward, backward
and step in a later step than the first, and reserved bytes of all steps. The 12B of its vision notebook ran with transformers
5.17.0, a collator and two micro batches; the text in one row with the release that its notebook installs, and without
`fix_untrained_tokens`, which copies the whole of a table of zeros.
"""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.job import compiled_layers
from peftplan.job.configs.read import read_text
from tests.memory.test_compiled_layers import GEMMA
from tests.memory.test_compiled_text_parts import TRAINING, with_layers

OF_TEXT = r".*language_model\.layers\..*\.(?:[qkvo]|gate|up|down)_proj"
IN_ONE_ROW = {**GEMMA, "r": 8, "target_modules": OF_TEXT}


def with_types(types: str, r: int, monkeypatch: pytest.MonkeyPatch, *, rows: bool) -> dict[str, Any]:
    """The config of Gemma 4 12B with these kinds of layers, which the record of this rank describes too, of rows that stay apart
    or not."""
    config = with_layers("gemma-4-12b-it", len(types), monkeypatch)
    config["text_config"]["layer_types"] = ["full_attention" if kind == "f" else "sliding_attention" for kind in types]
    (row,) = (
        row for row in compiled_layers.load("compiled_layers.json", list) if (row["r"], row.get("rows", False)) == (r, rows)
    )
    last = [types.rindex(kind) for kind in "sf"]
    numbers = ([n for n, kind in enumerate(types) if kind == "f" and n not in last], *([n] for n in last))
    others = [(where, *events) for where, (_, *events) in zip(numbers, row["others"], strict=True)]
    changed = {**row, "others": others, "adapted": {"v_proj": types.count("s")}}
    monkeypatch.setattr(compiled_layers, "load", lambda *_: [changed])
    return config


GEMMA_12B = {
    **TRAINING, "r": 32,
    "target_modules": r".*language_model\.layers\..*\.(?:[qkvo]|gate|up|down)_proj|.*embed_audio\.embedding_projection",
}  # fmt: skip
LEFT_OUT = (75_820_032, 89_440_768, 75_755_520)
"""What the graph of the last two layers holds of the backward before, until Python collects it."""


@pytest.mark.parametrize(
    ("types", "by_phase", "reserved"),
    [
        ("sssssf", (5_804_609_536, 5_804_410_880, 5_133_705_728), 6_079_643_648),
        ("sfsf", (4_888_854_528, 4_888_655_872, 4_217_950_720), 5_129_633_792),
    ],
)
def test_what_is_left_out_does_not_grow_with_depth(
    types: str, by_phase: tuple[int, ...], reserved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 4 12B by FastVisionModel, text alone, 1 x 2,048 tokens: sliding and full attention, and the last layer of each hands
    on keys and values."""
    config = with_types(types, 32, monkeypatch, rows=True)
    peaks = estimate(config, **GEMMA_12B, batch_size=1, seq_len=2048).peaks
    assert peaks is not None
    short = [ran - peaks.by_phase[phase] for phase, ran in zip(("forward", "backward", "step"), by_phase, strict=True)]
    assert short == pytest.approx(LEFT_OUT, abs=100_000)
    assert peaks.reserved == pytest.approx(reserved, rel=0.011)


def test_a_whole_vision_notebook_without_its_pictures() -> None:
    """Gemma 4 12B, 4 micro batches of 1 x 2,048 tokens; of its 48 layers Python collects in time what is left out above."""
    peaks = estimate("gemma-4-12b-it", **{**GEMMA_12B, "gradient_accumulation_steps": 4}, batch_size=1, seq_len=2048).peaks
    assert peaks is not None
    by_phase = (25_956_888_064, 25_962_776_064, 25_285_984_256)
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.001)
    assert peaks.reserved == pytest.approx(26_231_177_216, rel=0.003)


@pytest.mark.parametrize(
    ("types", "sizes", "by_phase", "reserved"),
    [
        ("ssfsf", (1, 2048), (5_184_365_056, 5_169_719_808, 4_513_477_632), None),
        ("ssfsf", (1, 1500), (5_143_684_096, 4_982_769_152, 4_505_035_776), None),
        ("ssfsssf", (2, 640), (6_038_033_408, 5_828_580_864, 5_411_991_552), 6_083_837_952),
    ],
)
def test_layers_of_text_in_one_row(
    types: str, sizes: tuple[int, int], by_phase: tuple[int, ...], reserved: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By FastModel with transformers 5.10.1 and two micro batches. The record is of the first two rows, whose reserved bytes are
    those of the copied table. Left out are 13 to 28 kB per token, of which 10 are keys and values of the last two layers."""
    config = with_types(types, 8, monkeypatch, rows=False)
    job = {**IN_ONE_ROW, "gradient_accumulation_steps": 2}
    peaks = estimate(config, **job, batch_size=sizes[0], seq_len=sizes[1]).peaks
    assert peaks is not None
    assert peaks.by_phase["step"] == pytest.approx(by_phase[2], rel=3e-6)
    short = [1 - peaks.by_phase[phase] / ran for phase, ran in zip(("forward", "backward"), by_phase, strict=False)]
    assert all(0 < part < 0.009 for part in short)
    assert reserved is None or peaks.reserved == pytest.approx(reserved, rel=0.002)


@pytest.mark.parametrize(
    ("types", "sizes", "by_phase", "reserved"),
    [
        ("ssfsf", (2, 1536), (5_278_060_032, 5_513_643_008, 4_529_348_096), 5_869_928_448),
        ("ssfsf", (2, 1100), (5_187_467_776, 5_230_002_688, 4_529_321_472), None),
        ("ssfsssf", (2, 1536), (6_182_951_424, 6_427_725_824, 5_439_695_360), 6_744_440_832),
        ("ssfsssf", (3, 1200), (6_172_753_408, 6_600_156_160, 5_447_823_872), None),
    ],
)
def test_layers_of_rows_that_stay_apart(
    types: str, sizes: tuple[int, int], by_phase: tuple[int, ...], reserved: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By FastModel with transformers 5.10.1, as the audio notebook names it. The record is of the first two rows; buffers of
    2 x 1,536 tokens stay where 2 x 1,100 follow them."""
    config = with_types(types, 8, monkeypatch, rows=True)
    job = {**GEMMA_12B, "r": 8, "gradient_accumulation_steps": 1}
    result = estimate(config, **job, batch_size=sizes[0], seq_len=sizes[1])
    peaks = result.peaks
    assert peaks is not None
    assert result.trainable_parameters == {5: 3_458_048, 7: 4_822_016}[len(types)]
    short = [1 - peaks.by_phase[phase] / ran for phase, ran in zip(("forward", "backward", "step"), by_phase, strict=True)]
    assert all(-0.0001 < part < 0.009 for part in short)
    assert reserved is None or peaks.reserved == pytest.approx(reserved, rel=0.012)


def test_a_whole_notebook_of_text() -> None:
    """All 48 layers, 4 micro batches of 1 x 2,048 tokens, with transformers 5.10.1; no record was made of it."""
    peaks = estimate("gemma-4-12b-it", **{**IN_ONE_ROW, "gradient_accumulation_steps": 4}, batch_size=1, seq_len=2048).peaks
    assert peaks is not None
    by_phase = (24_969_648_128, 24_970_731_520, 24_298_760_704)
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.002)
    assert peaks.reserved == pytest.approx(25_167_921_152, rel=0.004)


NOTEBOOK = """
from unsloth import FastModel
model, tokenizer = FastModel.from_pretrained(model_name="unsloth/MODEL", max_seq_length=1024, load_in_4bit=False)
model = FastModel.get_peft_model(model, finetune_vision_layers=False, r=8, use_gradient_checkpointing="unsloth")
SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=1, max_steps=60)).train()
"""


@pytest.mark.parametrize(("model", "reentrant"), [("gemma-4-E2B-it", False), ("gemma-4-E4B-it", False), ("gemma-4-31B-it", True)])
def test_checkpoints_of_layers_that_borrow_keys(model: str, reentrant: bool) -> None:
    """A rehearsal of E2B with nine layers ran its forward again in `unpack_hook` (torch, utils/checkpoint.py)."""
    options = read_text(NOTEBOOK.replace("MODEL", model), file="a.py").options
    assert (options["use_reentrant"], options["offload_checkpoints"]) == (reentrant, reentrant)
