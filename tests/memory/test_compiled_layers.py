"""Layers that torch compiles whole: what is recorded of one says what a program of Unsloth held on the emulated card."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peftplan import estimate
from peftplan.datafiles import load
from peftplan.job.compiled_layers import Recorded
from peftplan.memory.models.recorded import scales
from peftplan.results.peaks import Peaks
from tools.compiled_layers import BACKWARD, RECOMPUTED, Batch, Event, text_of

RECORDS: list[dict[str, Any]] = load("compiled_layers.json", list)
GEMMA: dict[str, Any] = {
    "method": "lora", "r": 128, "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "trainer": "trl",
    "kernels": "unsloth-compiled", "loss": "unsloth", "gradient_checkpointing": True, "offload_checkpoints": True,
    "use_reentrant": True, "kbit_prepare": False, "adapter_dtype": "fp32", "optim": "adamw_8bit", "use_cache": False,
}  # fmt: skip
GRANITE = {**GEMMA, "r": 32, "target_modules": "q_proj,k_proj,v_proj,o_proj"}
OF_GRANITE = [
    ((2, 2048, 4), (1_069_604_864, 955_921_408, 798_960_128), 1_214_251_008),
    ((3, 1300, 4), (1_065_969_664, 947_611_648, 798_138_880), 1_218_445_312),
]
"""As below, of FastLanguageModel with Granite 4.0 350M; the phases of the second row are those of its second step, since its last
batch is shorter. The first step, which times kernels, reserves 3 % less than is estimated."""
REHEARSED = [
    ((4, 2048, 1), (1_119_053_824, 1_250_563_072, 879_427_072), 1_562_378_240),
    ((3, 2008, 1), (1_092_212_736, 1_145_978_368, 873_743_872), 1_455_423_488),
    ((2, 1024, 2), (1_421_041_152, 963_638_784, 863_518_720), 1_457_520_640),
]
"""Batch size, length and micro batches; peaks of forward, backward and step in the third step; and reserved bytes of Unsloth's
FastModel with Gemma 3 270M on an emulated A100 80 GB: unsloth and unsloth_zoo 2026.10.9, transformers 5.17.0, trl 1.15.0, torch
2.13.0. The record is of the second row."""


def peaks_of(sizes: tuple[int, int, int], model: str = "gemma-3-270m", options: dict[str, Any] = GEMMA) -> Peaks:
    """The peaks of a row."""
    names = ("batch_size", "seq_len", "gradient_accumulation_steps")
    peaks = estimate(model, **options, **dict(zip(names, sizes, strict=True))).peaks
    assert peaks is not None
    return peaks


@pytest.mark.parametrize(("sizes", "by_phase", "reserved"), REHEARSED)
def test_the_record_says_what_a_step_held(sizes: tuple[int, int, int], by_phase: tuple[int, ...], reserved: int) -> None:
    peaks = peaks_of(sizes)
    assert peaks.reserved_source.endswith("expandable_segments:True")
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.0005)
    assert peaks.reserved == pytest.approx(reserved, rel=0.0015)


@pytest.mark.parametrize(
    ("sizes", "by_phase", "reserved"),
    [
        ((4, 2048, 2), (974_209_536, 986_885_632, 613_079_040), 1_262_485_504),
        ((3, 2008, 2), (947_317_760, 882_390_528, 607_393_792), 1_157_627_904),
    ],
)
def test_rank_16_has_a_record_of_its_own(sizes: tuple[int, int, int], by_phase: tuple[int, ...], reserved: int) -> None:
    """Rehearsed as above, with FastLanguageModel; the record is of these rows."""
    peaks = peaks_of(sizes, options={**GEMMA, "r": 16})
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.0005)
    assert peaks.reserved == pytest.approx(reserved, rel=0.025)


@pytest.mark.parametrize(("sizes", "by_phase", "reserved"), OF_GRANITE)
def test_granite_has_a_record_too(sizes: tuple[int, int, int], by_phase: tuple[int, ...], reserved: int) -> None:
    """Its multiplied embedding, fp32 result of the last norm, and flash attention whose backward rounds tokens up to 128."""
    peaks = peaks_of(sizes, "granite-4.0-350m", GRANITE)
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.0005)
    assert peaks.reserved == pytest.approx(reserved, rel=0.03)


QAT: dict[str, Any] = {
    "method": "full", "dtype": "bf16", "autocast": "none", "trainer": "trl", "loss": "unsloth", "gradient_checkpointing": True,
    "offload_checkpoints": True, "use_reentrant": True, "use_cache": False, "kernels": "unsloth-qat-int4", "optim": "adamw_torch",
}  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "by_phase", "reserved"),
    [
        ((8, 2048, 4), (3_200_267_264, 3_221_677_568, 2_742_141_440), 3_546_284_032),
        ((6, 2008, 4), (3_157_232_640, 3_037_554_688, 2_730_561_024), 3_460_300_800),
    ],
)
def test_all_of_gemma_trains_with_fake_quantized_weights(
    sizes: tuple[int, int, int], by_phase: tuple[int, ...], reserved: int
) -> None:
    """Rehearsed as above, with full_finetuning and qat_scheme int4; the record is of the first row."""
    peaks = peaks_of(sizes, "gemma-3-270m", QAT)
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.001)
    assert peaks.reserved == pytest.approx(reserved, rel=0.02)


@pytest.mark.parametrize(
    ("sizes", "by_phase", "reserved"),
    [
        ((2, 1024, 4), (6_385_114_112, 6_227_420_160, 5_574_670_336), 6_874_464_256),
        ((2, 2048, 4), (6_593_182_720, 6_277_792_768, 5_586_237_440), 6_945_767_424),
        ((3, 1004, 4), (6_482_102_272, 6_250_179_584, 5_580_208_128), 7_111_442_432),
    ],
)
def test_all_of_qwen_trains_with_fake_quantized_activations_and_embedding(
    sizes: tuple[int, int, int], by_phase: tuple[int, ...], reserved: int
) -> None:
    """Rehearsed as above, with qat_scheme phone-deployment; the record is of the first two rows, the third is a witness. The head
    is untied, scales last from forward to forward, and the loss is that by torch.func."""
    options = {**QAT, "kernels": "unsloth-qat-int8-int4", "optim": "adamw_8bit"}
    peaks = peaks_of(sizes, "qwen3-0.6b", options)
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.0001)
    assert peaks.reserved == pytest.approx(reserved, rel=0.001)


def test_the_gradient_of_a_rounded_table_is_new_beside_the_one_behind_it() -> None:
    """Few tokens, and nothing accumulated: backward peaks at its end, where inductor's kernel reads the gradient of the rounded
    table (151,936 x 1,024 in bf16) and writes the table's; the step has the second alone, beside kilobytes."""
    peaks = peaks_of((1, 64, 1), "qwen3-0.6b", {**QAT, "kernels": "unsloth-qat-int8-int4", "optim": "adamw_8bit"})
    assert peaks.by_phase["backward"] - peaks.by_phase["step"] == pytest.approx(151_936 * 1_024 * 2, abs=2**18)


@pytest.mark.parametrize("changed", [{"kernels": "unsloth-compiled"}, {"autocast": "bf16"}, {"dtype": "fp32"}])
def test_full_fine_tuning_has_a_record_of_one_scheme(changed: dict[str, Any]) -> None:
    assert estimate("gemma-3-270m", **{**QAT, **changed}).peaks is None


def test_granite_with_mamba_has_no_record() -> None:
    assert estimate("granite-4.0-h-micro", **GRANITE).peaks is None


def test_the_first_step_times_kernels_with_a_buffer_more() -> None:
    """The first step's peak is 1,334,087,680 bytes, above that of later ones."""
    assert peaks_of(REHEARSED[0][0]).reserved > 1_334_087_680


def test_older_cards_have_no_record() -> None:
    result = estimate("gemma-3-270m", **GEMMA, gpu="t4")
    assert [verdict.verdict for verdict in result.gpus] == ["unknown"]


@pytest.mark.parametrize(
    "changed",
    [
        {"r": 64},
        {"target_modules": "q_proj"},
        {"exclude_modules": r".*layers\.3\..*"},
        {"layers_to_transform": [0, 1]},
        {"lora_dropout": 0.1},
        {"bias": "all"},
        {"freeze_a": True},
        {"use_reentrant": False},
        {"padding": True},
    ],
)
def test_other_options_have_no_record(changed: dict[str, Any]) -> None:
    result = estimate("gemma-3-270m", **{**GEMMA, **changed})
    assert result.peaks is None
    assert "not recorded with these options" in json.dumps(result.to_dict())


@pytest.mark.parametrize("row", RECORDS, ids=lambda row: row["model"])
def test_a_record_frees_each_tensor_once_and_leaves_gradients(row: dict[str, Any]) -> None:
    record = Recorded(**row)
    alive: dict[int, str] = {}
    count = 0
    for event in record.training.replace("|", "").split():
        if event.startswith("-"):
            del alive[-int(event)]
        else:
            count += 1
            alive[count] = event
    hidden = alive.pop(record.output)
    backward = len([event for event in record.training.partition("|")[0].split() if not event.startswith("-")])
    gradients = [event for number, event in alive.items() if number > backward or event == hidden]
    assert gradients.count(hidden) == 1  # the gradient of the input, which may lie in a tensor of forward
    of_all = {"gemma-3-270m": 7 + 6, "qwen3-0.6b": 7 + 4, "modernbert-large": 4 + 2, "qwen2.5-1.5b": 7 + 3 + 2}
    # linear layers, biases, norms
    layer = of_all.get(record.model, 0)
    elsewhere = sum(len(layers) for layers, *_ in record.others)
    modules = len(record.modules) - sum(copies <= elsewhere for copies in record.adapted.values())  # of most layers
    modules += record.model == "glm-4.7-flash"  # whose shared expert has a down_proj too
    modules += 3 * 64 * (record.model == "ernie-4.5-21b-a3b-pt")  # of experts beside the shared one
    assert len(gradients) == 1 + (2 * modules or layer)  # A and B of each module, or all of the layer
    assert (len(alive) > len(gradients)) is (record.scheme == "int8-int4")  # scales, as many as a forward without a graph leaves
    assert len(scales(record)) == len(alive) - len(gradients) if record.scheme == "int8-int4" else True


def test_sizes_are_told_apart_by_a_second_length() -> None:
    """Of 4,000 tokens one tensor has as many bytes as a constant one; of 6,000 it has more. What lies between is not the layer's
    own; a size that is neither is an error."""
    first = [
        Event(1, 64_000, RECOMPUTED, tunes=False),
        Event(2, 64_000, BACKWARD, tunes=False),
        Event(1, 64_000, RECOMPUTED, False, ends=True),
    ]
    other = Event(9, 8_000, RECOMPUTED, False, ends=True)
    second = [first[0]._replace(size=96_000), first[1], first[2]._replace(size=96_000), other]
    batches = (Batch(2, 2_000), Batch(3, 2_000))
    assert text_of(first, second, batches) == "16t | 64000 -1"
    assert text_of(first[:1], [first[0]._replace(size=70_000)], batches) == "64000"  # inductor's partial sums
    with pytest.raises(ValueError, match="6400000 bytes are neither constant nor per token"):
        text_of([first[0]._replace(size=6_400_000)], [first[0]._replace(size=7_000_000)], batches)


def test_tokens_up_to_a_multiple_are_told_apart() -> None:
    """4,000 tokens are 4,096 and 2,500 are 2,560, of 64 bytes each."""
    first, second = ([Event(1, size, BACKWARD, tunes=False)] for size in (262_144, 163_840))
    assert text_of(first, second, (Batch(2, 2_000), Batch(1, 2_500))) == "| 64t%128"


def test_rows_of_a_mask_up_to_a_multiple_are_told_apart() -> None:
    """All pairs of 1,500 tokens in 16 bits, with 1,504 to a row but the last; 2,048 are a multiple of 8 as they are."""
    first, second = ([Event(1, size, RECOMPUTED, tunes=False)] for size in (2 * 2_048**2, 2 * (1_499 * 1_504 + 1_500)))
    assert text_of(first, second, (Batch(1, 2_048), Batch(1, 1_500))) == "2a"
