"""Recorded layers with Mamba 2: torch compiles what stands around the kernels of mamba-ssm, for Unsloth."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from peftplan import estimate
from peftplan.datafiles import load
from peftplan.job import compiled_layers
from peftplan.job.configs.plan import ConfigPlan
from peftplan.job.configs.read import read_text
from peftplan.job.sources import load_config
from tests.memory.test_compiled_layers import GRANITE
from tools.compiled_layers import BACKWARD, FORWARD, OTHER, Event
from tools.kept_layers import layers_of, training_of

ROWS: list[dict[str, Any]] = load("compiled_layers.json", list)
TYPES = ["mamba", "mamba", "attention", "mamba"]
OF_GRANITE = [
    ((2, 2048), (1_380_593_152, 1_602_834_432, 1_044_920_320), 1_860_173_824),
    ((2, 1400), (1_332_719_104, 1_424_099_328, 1_034_242_048), None),
]
"""Batch size and length, two micro batches; peaks of phases in the second step and reserved bytes of Unsloth's FastLanguageModel
over four layers of Granite 4.0 h-micro on an emulated A100: unsloth and unsloth_zoo 2026.10.9, transformers 4.56.2, trl 0.22.2,
torch 2.10.0, causal-conv1d 1.6.2 and mamba-ssm 2.3.2, with shorter rows 2.2.5, whose kernels were not timed. The record is of
these rows; of partial sums of Mamba 2 there are as many as keep a card busy, which the length decides."""


def four_layers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The config of four layers, of which the record has the third."""
    config = {**copy.deepcopy(load_config("granite-4.0-h-micro")), "dtype": "bfloat16"}
    config |= {"num_hidden_layers": len(TYPES), "layer_types": TYPES}
    (row,) = (row for row in ROWS if row["model"] == "granite-4.0-h-micro")
    others = [([TYPES.index("attention")], *events) for _, *events in row["others"]]
    adapted = dict.fromkeys(row["adapted"], TYPES.count("attention"))
    rows = [{**row, "model": config["model_type"], "others": others, "adapted": adapted}]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: rows)
    return config


@pytest.mark.parametrize(("sizes", "by_phase", "reserved"), OF_GRANITE)
def test_a_mixer_between_two_graphs(
    sizes: tuple[int, int], by_phase: tuple[int, ...], reserved: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mamba 2 allocates for whole chunks of each row, and no batch becomes one row: a state would go from row to row."""
    options = {**GRANITE, "kernels": "unsloth-rows", "gradient_accumulation_steps": 2}
    peaks = estimate(four_layers(monkeypatch), **options, batch_size=sizes[0], seq_len=sizes[1]).peaks
    assert peaks is not None
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.002)
    if reserved is not None:
        assert peaks.reserved == pytest.approx(reserved, rel=0.025)


def test_all_forty_layers_of_granite_as_unsloth_ran() -> None:
    """As above, of the whole model: what is estimated has one hidden state more, 16.8 MB. Kernels were not timed."""
    options = {**GRANITE, "kernels": "unsloth-rows", "gradient_accumulation_steps": 2}
    peaks = estimate("granite-4.0-h-micro", **options, batch_size=2, seq_len=2048).peaks
    assert peaks is not None
    expected = [ran + 2 * 2048 * 2048 * 2 for ran in (6_787_024_384, 7_009_265_664, 6_451_351_552)]
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(expected, rel=0.0001)


NOTEBOOK = """
!pip install transformers==4.56.2 trl==0.22.2
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/granite-4.0-h-micro", max_seq_length=2048, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=32, use_gradient_checkpointing="unsloth", target_modules=["q_proj", "k_proj",
    "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "shared_mlp.input_linear", "shared_mlp.output_linear"])
trainer = SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=60))
trainer.train()
"""


def of_notebook(text: str) -> ConfigPlan:
    """The plan of a notebook of one cell."""
    return read_text(json.dumps({"cells": [{"cell_type": "code", "source": [text]}]}), file="a.ipynb")


def test_the_notebook_of_granite_has_a_peak() -> None:
    """1,703,936 trainable parameters, as its output says."""
    plan = of_notebook(NOTEBOOK)
    assert not plan.unsupported
    assert "mamba-ssm" in plan.assumed["kernels"]
    result = estimate(config=plan)
    assert (result.trainable_parameters, result.bound) == (1_703_936, None)
    assert result.peaks is not None


@pytest.mark.parametrize(
    ("written", "instead"),
    [("==4.56.2", "==5.3.0"), ("h-micro", "h-tiny"), ("r=32", "r=16"), ("max_steps=60", "packing=True"), ("=False)", "=True)")],
)
def test_other_notebooks_of_granite_have_no_record(written: str, instead: str) -> None:
    result = estimate(config=of_notebook(NOTEBOOK.replace(written, instead)))
    assert result.peaks is None or result.bound is not None


FALCON: dict[str, Any] = {
    **GRANITE, "method": "qlora", "kernels": "unsloth-rows", "r": 64, "lora_dropout": 0.1, "gradient_checkpointing": False,
    "offload_checkpoints": False, "quant_skip_modules": "lm_head,in_proj,out_proj", "gradient_accumulation_steps": 2,
    "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
}  # fmt: skip
OF_FALCON = [
    (64, (1, 2048), (936_358_912, 683_751_936, 244_824_064), 1_189_085_184),
    (64, (1, 1400), (719_891_968, 549_302_272, 244_793_344), 994_050_048),
    (16, (2, 2048), (1_327_889_408, 1_054_979_072, 217_028_096), 1_363_148_800),
    (16, (2, 1300), (1_024_329_216, 759_309_824, 216_922_112), 1_063_256_064),
]
BY_FUNCTION = [
    (16, (2, 2048), (1_575_384_064, 1_054_881_280, 216_930_304), 1_860_173_824),
    (16, (2, 1300), (1_079_858_176, 759_247_360, 216_859_648), 1_352_663_040),
]
"""Rank, batch size and length, two micro batches; as above of four layers of Falcon H1 0.5B in NF4 without checkpoints:
transformers 5.17.0, trl 1.15.0, bitsandbytes 0.50.2, torch 2.13.0, mamba-ssm 2.3.2, whose kernels were not timed with shorter
rows. Rank 16 with transformers 4.56.2 and trl 0.22.2, whose loss is the fused kernel; `BY_FUNCTION` with transformers 5.17.0 and
trl 1.15.0, whose loss is that by torch.func."""


@pytest.mark.parametrize(
    ("kernels", "r", "sizes", "by_phase", "reserved"),
    [*(("unsloth-rows", *ran) for ran in OF_FALCON), *(("unsloth-function", *ran) for ran in BY_FUNCTION)],
)
def test_layers_that_keep_what_they_made(
    kernels: str, r: int, sizes: tuple[int, int], by_phase: tuple[int, ...], reserved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step times the kernel of the loss beside all that the layers keep: 256 MiB more, which decide what is reserved.
    Backward is above what ran by the incoming gradient and a layer's own, which end halfway there."""
    config = {**copy.deepcopy(load_config("falcon-h1-0.5b-base")), "dtype": "bfloat16", "num_hidden_layers": 4}
    rows = [{**row, "model": "falcon_h1"} for row in ROWS if row["model"] == "falcon-h1-0.5b-base"]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: rows)
    peaks = estimate(config, **{**FALCON, "r": r, "kernels": kernels}, batch_size=sizes[0], seq_len=sizes[1]).peaks
    assert peaks is not None
    forward, backward, step = by_phase
    assert [peaks.by_phase[phase] for phase in ("forward", "step")] == pytest.approx((forward, step), rel=0.0006)
    of_layer = r * 3_735_552 // 64
    own = 2 * 1024 * sizes[0] * sizes[1] + of_layer
    assert peaks.by_phase["backward"] == pytest.approx(backward + own, rel=0.001 if r == 64 else 0.005)
    assert peaks.reserved == pytest.approx(reserved, rel=0 if r == 64 else 0.016)


OF_ALPACA = """
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(model_name="tiiuae/Falcon-H1-0.5B-Instruct", max_seq_length=2048,
    dtype=None, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=32, lora_dropout=0.1, use_gradient_checkpointing=False,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
trainer = SFTTrainer(model=model, max_seq_length=2048, packing=False, args=TrainingArguments(per_device_train_batch_size=1,
    gradient_accumulation_steps=8, max_steps=60, optim="adamw_8bit", bf16=True))
trainer.train()
"""


def test_the_notebook_of_falcon_has_a_peak() -> None:
    plan = of_notebook(OF_ALPACA)
    assert not plan.unsupported
    assert plan.options["quant_skip_modules"] == ("lm_head", "in_proj", "out_proj")
    result = estimate(config=plan)
    assert (result.trainable_parameters, result.bound) == (33_619_968, None)
    assert result.peaks is not None


@pytest.mark.parametrize(("pinned", "kernels"), [("!pip install transformers==4.56.2", "rows"), ("", "function")])
def test_a_lower_rank_has_a_peak_beside_both_releases_of_transformers(pinned: str, kernels: str) -> None:
    """One of its notebooks pins transformers 4, whose forward ends in the fused loss."""
    plan = of_notebook(pinned + OF_ALPACA.replace("r=64", "r=16").replace("batch_size=1", "batch_size=2"))
    assert not plan.unsupported
    assert plan.options["kernels"] == f"unsloth-{kernels}"
    result = estimate(config=plan)
    assert (result.trainable_parameters, result.bound) == (8_404_992, None)
    assert result.peaks is not None


@pytest.mark.parametrize(
    ("written", "instead"),
    [("=0.1", "=0"), ("checkpointing=False", "checkpointing=True"), ("4bit=True", "4bit=False"), ("r=64", "r=32")],
)
def test_other_notebooks_of_falcon_have_no_record(written: str, instead: str) -> None:
    result = estimate(config=of_notebook(OF_ALPACA.replace(written, instead)))
    assert result.peaks is None or result.bound is not None


def test_a_layer_without_checkpoints_is_told_from_what_ends_between_its_parts() -> None:
    """Two layers of two tensors each, of which the second is the result; the loss; the backward of the last norm; and a gradient
    of each layer, which stays."""
    allocations = [
        (1, FORWARD, "norm"), (2, FORWARD, "mlp"), (3, FORWARD, "norm"), (4, FORWARD, "mlp"), (5, OTHER, "loss"),
        (6, BACKWARD, "last norm"), (7, BACKWARD, "gradient"), (8, BACKWARD, "gradient"),
    ]  # fmt: skip
    events = [(Event(number, 8 * number, place, tunes=False), kernel) for number, place, kernel in allocations]
    ends = {6: [4], 7: [2, 3], 8: [1]}  # allocation -> those that end behind it
    log = [each for event in events for each in (event, *(_end(events[n - 1]) for n in ends.get(event[0].number, ())))]
    first, second = layers_of(log)
    (own, result), (_, last) = training_of(first), training_of(second)
    assert (result, last) == (2, 2)
    assert [event.number for event in own if not event.ends] == [1, 2, 8]
    assert [event.number for event in second.backward if not event.ends] == [7]


def _end(allocation: tuple[Event, str]) -> tuple[Event, str]:
    return allocation[0]._replace(ends=True), allocation[1]
