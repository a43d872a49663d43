"""Text parts that torch compiles for Unsloth layer by layer: rehearsals of its own loading and training, without pictures.

unsloth and unsloth_zoo 2026.10.9, transformers 5.17.0, trl 1.15.0, bitsandbytes 0.50.2, torch 2.13.0 on an emulated A100: two
micro batches a step, adamw_8bit, a collator that keeps rows apart. Each row: peaks of forward, backward and step in the second
step, and reserved bytes of all steps, of which the first times kernels.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from peftplan import estimate
from peftplan.datafiles import load
from peftplan.job import compiled_layers
from peftplan.job.sources import load_config
from tests.memory.test_compiled_layers import GEMMA

ROWS: list[dict[str, Any]] = load("compiled_layers.json", list)
OF_TEXT = r".*language_model\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj"
TRAINING = {**GEMMA, "kernels": "unsloth-rows", "gradient_accumulation_steps": 2}
QWEN = {**TRAINING, "method": "qlora", "r": 16, "target_modules": OF_TEXT, "quant_skip_modules": "lm_head,model.visual"}
MINISTRAL = {**TRAINING, "r": 32, "target_modules": OF_TEXT}
GEMMA_4B = {
    **TRAINING, "method": "qlora", "kernels": "unsloth-compiled", "r": 8, "target_modules": OF_TEXT,
    "quant_skip_modules": ",".join(next(row["in_16_bits"] for row in ROWS if row["model"] == "gemma-3-4b-it")),
}  # fmt: skip
LFM = {**TRAINING, "r": 16, "target_modules": r".*(self_attn|feed_forward)\.(q_proj|k_proj|v_proj|out_proj|w1|w2|w3)"}


def with_layers(model: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The config of a built-in model with so many layers, which the model's record describes too."""
    config: dict[str, Any] = {**copy.deepcopy(load_config(model)), "dtype": "bfloat16"}
    text = config.get("text_config", config)
    text["num_hidden_layers"] = layers
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:layers]
    if "depth" in config.get("vision_config", {}):
        config["vision_config"]["depth"] = 2
    rows = [{**row, "model": config["model_type"]} for row in ROWS if row["model"] == model]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: rows)
    return config


@pytest.mark.parametrize(
    ("model", "job", "sizes", "by_phase", "reserved"),
    [
        ("qwen2.5-vl-7b-instruct", QWEN, (2, 2048), (3_552_496_128, 4_021_474_304, 2_965_916_160), 4_647_288_832),
        ("ministral-3-3b-instruct-2512", MINISTRAL, (4, 2048), (3_394_162_176, 4_055_423_488, 2_771_025_920), 4_424_990_720),
    ],
)
def test_four_layers_of_a_text_part(
    model: str,
    job: dict[str, Any],
    sizes: tuple[int, int],
    by_phase: tuple[int, ...],
    reserved: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FastVisionModel, of which the text part alone trains. Reserved bytes are up to 3.8 % above what was rehearsed: blocks that
    the first step's timing leaves lie elsewhere."""
    config = with_layers(model, 4, monkeypatch)
    peaks = estimate(config, **job, batch_size=sizes[0], seq_len=sizes[1]).peaks
    assert peaks is not None
    assert peaks.assumed["images_per_sample"] == 0
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.001)
    assert reserved <= peaks.reserved <= 1.038 * reserved


@pytest.mark.parametrize(
    ("layers", "by_phase", "reserved"),
    [
        (8, (4_053_993_472, 4_143_159_296, 3_390_423_552), 4_544_528_384),
        (34, (5_436_055_552, 5_525_221_376, 4_772_485_632), 5_874_122_752),
    ],
)
def test_layers_of_which_a_repository_leaves_some_in_16_bits(
    layers: int, by_phase: tuple[int, ...], reserved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3 4B by FastModel, text alone in one row: the MLPs of six layers and the attention of one are in 16 bits. The record
    is of eight layers; all 34 are the notebook's job."""
    peaks = estimate(with_layers("gemma-3-4b-it", layers, monkeypatch), **GEMMA_4B, batch_size=2, seq_len=2048).peaks
    assert peaks is not None
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.0001)
    assert peaks.reserved == pytest.approx(reserved, rel=0.012)


QWEN_35 = {
    **TRAINING, "r": 16,
    "target_modules": r".*(language_model|visual)\..*(attn|mlp)\.(\w+_proj|in_proj_\w+|qkv|proj|linear_fc\d)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "trainable", "by_phase", "off", "reserved"),
    [
        ("qwen3.5-4b", 8_640_512, (3_939_905_024, 4_177_872_384, 3_312_203_776), 0.0007, (4_586_471_424, 4_586_471_424)),
        ("qwen3.5-2b", 6_130_688, (2_754_612_224, 2_717_450_240, 2_150_503_936), 0.00004, (2_990_238_208, 3_116_367_872)),
    ],
)
def test_layers_of_linear_attention(
    model: str,
    trainable: int,
    by_phase: tuple[int, ...],
    off: float,
    reserved: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Qwen3.5 by FastVisionModel in bf16, text alone, 2 x 2,048 tokens: every fourth layer attends, and kernels of the others are
    timed last. Adapters of the tower's two layers have a gradient and its states in an estimate, not in this run. Reserved bytes
    of 2B lie between what its first step allocated and what loading had reserved, which took more than training."""
    config = with_layers(model, 8, monkeypatch)
    (row,) = compiled_layers.load("compiled_layers.json", list)
    attending = len(row["others"][0][0])
    adapted = {name: 2 if layers == attending else 6 for name, layers in row["adapted"].items()}
    rows = [{**row, "timed": 6, "adapted": adapted, "others": [([3, 7], *row["others"][0][1:])]}]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: rows)
    result = estimate(config, **QWEN_35, batch_size=2, seq_len=2048)
    peaks = result.peaks
    assert peaks is not None
    assert result.trainable_parameters == trainable
    tower = 2 * 16 * (1024 + 3072 + 2 * 1024 + 2 * (1024 + 4096)) * (4 + 2)
    beside = [peaks.by_phase[phase] - tower for phase in ("forward", "backward", "step")]
    assert beside == pytest.approx(by_phase, rel=off)
    assert reserved[0] <= peaks.reserved - tower <= 1.01 * reserved[1]


@pytest.mark.parametrize(
    ("seq_len", "by_phase", "reserved"),
    [
        (2048, (4_345_415_680, 4_714_372_096, 3_843_248_640), 5_177_868_288),
        (1500, (4_281_864_192, 4_490_947_584, 3_825_189_888), None),
    ],
)
def test_layers_of_a_repository_in_4_bits(
    seq_len: int, by_phase: tuple[int, ...], reserved: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3-VL 8B by FastVisionModel beside transformers 4.57.1, text alone, two rows: of six layers one has its MLP, one its
    attention in 16 bits. One program, 1,500 tokens first. Adapters of the tower as above."""
    config = with_layers("qwen3-vl-8b-instruct", 6, monkeypatch)
    config["vision_config"]["deepstack_visual_indexes"] = [0, 1]
    (row,) = compiled_layers.load("compiled_layers.json", list)
    layers = "model.language_model.layers."
    skipped = ["lm_head", "model.visual", f"{layers}1.mlp", f"{layers}3.self_attn"]
    others = [([1], *row["others"][0][1:]), ([3], *row["others"][1][1:])]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: [{**row, "in_16_bits": skipped, "others": others}])
    job = {**QWEN_35, "method": "qlora", "quant_skip_modules": ",".join(skipped)}
    result = estimate(config, **job, batch_size=2, seq_len=seq_len)
    peaks = result.peaks
    assert peaks is not None
    assert result.trainable_parameters == 7_844_864
    tower = 2 * 16 * (1152 + 3456 + 2 * 1152 + 2 * (1152 + 4304)) * (4 + 2)
    beside = [peaks.by_phase[phase] - tower for phase in ("forward", "backward", "step")]
    assert beside == pytest.approx(by_phase, rel=1e-4)
    assert reserved is None or peaks.reserved == pytest.approx(reserved, rel=0.001)


def test_a_whole_notebook_of_linear_attention() -> None:
    """Qwen3.5 4B by FastVisionModel, 4 micro batches of 2 x 2,048 tokens, without gradients and states of the tower. One hidden
    state (21 MB) that eight layers hold is not there in 32: estimates are 0.2 % above."""
    peaks = estimate("qwen3.5-4b", **{**QWEN_35, "gradient_accumulation_steps": 4}, batch_size=2, seq_len=2048).peaks
    assert peaks is not None
    of_tower = 24 * 16 * (1024 + 3072 + 2 * 1024 + 2 * (1024 + 4096)) * (4 + 2)
    by_phase = [peaks.by_phase[phase] - of_tower for phase in ("forward", "backward", "step")]
    assert by_phase == pytest.approx((10_118_000_000, 10_356_000_000, 9_490_000_000), rel=0.003)


def test_a_length_that_is_not_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearsed with 2 x 1,024 tokens and adapters in the tower, which hold 4 bytes a number and, without pictures, no gradient.

    Layers without a graph, compiled for other lengths, share places of other sizes: forward, which is not the peak, +1.8 %.
    """
    config = with_layers("qwen2.5-vl-7b-instruct", 4, monkeypatch)
    result = estimate(config, **QWEN, batch_size=2, seq_len=1024)
    assert result.peaks is not None
    of_tower = 4 * (6_464_128 - result.to_dict()["trainable_parameters"])
    by_phase = [result.peaks.by_phase[phase] + of_tower for phase in ("forward", "backward", "step")]
    assert by_phase[1:] == pytest.approx((3_526_992_896, 2_939_214_336), rel=0.0001)
    assert by_phase[0] == pytest.approx(3_343_501_312, rel=0.02)
    assert result.peaks.reserved == pytest.approx(3_852_468_224, rel=0.026)


@pytest.mark.parametrize(
    ("sizes", "by_phase", "reserved", "off"),
    [
        ((2, 2048), (2_836_127_744, 3_005_194_752, 2_483_198_976), 3_326_083_072, 0.014),
        ((2, 1500), (3_322_523_136, 2_856_776_192, 2_474_168_320), 3_523_215_360, 0.05),
    ],
)
def test_layers_of_two_kinds(sizes: tuple[int, int], by_phase: tuple[int, ...], reserved: int, off: float) -> None:
    """LFM2 1.2B whole, by FastModel: convolutions without adapters in ten layers, attention in six. Its loss is by torch.func,
    whose own timing in the first step is left out: with 1,500 tokens a row that is the peak of all steps."""
    peaks = estimate("lfm2-1.2b", **LFM, batch_size=sizes[0], seq_len=sizes[1]).peaks
    assert peaks is not None
    assert "images_per_sample" not in peaks.assumed
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=0.0003)
    assert peaks.reserved == pytest.approx(reserved, rel=off)


def test_a_tied_embedding_that_trains_in_full_beside_layers() -> None:
    """LFM2 1.2B whole, by FastLanguageModel, as the notebook of LFM2.5's text completion names its targets. The second row ran
    behind two steps of the first, whose larger buffers in which hidden states come back from the host stay: 8.5 MB."""
    job = {**LFM, "r": 128, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    first, second = (estimate("lfm2-1.2b", **job, batch_size=2, seq_len=length) for length in (2048, 1500))
    assert first.trainable_parameters == 207_355_904
    assert first.peaks is not None
    assert second.peaks is not None
    by_phase = [(5_474_549_760, 5_518_590_464, 4_735_761_408), (5_840_223_744, 5_383_160_320, 4_735_721_472)]
    for result, rehearsed, rel in zip((first.peaks, second.peaks), by_phase, (0.001, 0.002), strict=True):
        assert [result.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(rehearsed, rel=rel)
    assert first.peaks.reserved == pytest.approx(5_802_819_584, rel=0.004)
    assert second.peaks.reserved == pytest.approx(6_081_740_800, rel=0.021)


def test_a_tower_that_trains_has_gradients_and_states() -> None:
    """At the peak of the text part's backward in a second micro batch: 4 bytes a number for the adapter, 4 for its gradient of
    the first one, and 2 for both states in 8 bits."""
    text, both = (
        estimate("ministral-3-3b-instruct-2512", **{**MINISTRAL, "target_modules": names}, batch_size=4, seq_len=2048)
        for names in (OF_TEXT, r".*\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj")
    )
    assert text.peaks is not None
    assert both.peaks is not None
    assert both.to_dict()["trainable_parameters"] == 67_502_080  # as the notebook prints
    more = 67_502_080 - text.to_dict()["trainable_parameters"]
    assert both.peaks.by_phase["backward"] - text.peaks.by_phase["backward"] == pytest.approx(10 * more, rel=0.02)


@pytest.mark.parametrize("changed", [{"r": 8}, {"kernels": "unsloth-compiled"}, {"target_modules": r".*language_model.*q_proj"}])
def test_other_options_have_no_record(changed: dict[str, Any]) -> None:
    assert estimate("qwen2.5-vl-7b-instruct", **{**QWEN, **changed}).peaks is None


GLM = {
    **TRAINING, "kernels": "unsloth-compiled", "r": 8, "target_modules": "q_proj,o_proj,gate_proj,up_proj,down_proj",
    "target_parameters": "mlp.experts.gate_up_proj,mlp.experts.down_proj",
}  # fmt: skip


@pytest.mark.parametrize(
    ("seq_len", "by_phase", "longer"),
    [
        (2048, (5_051_051_520, 6_239_417_856, 4_159_761_920), 0),
        (1500, (5_249_451_520, 5_645_967_872, 4_159_657_472), 548),
    ],
)
def test_a_mixture_whose_experts_are_adapted(
    seq_len: int, by_phase: tuple[int, ...], longer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GLM-4.7-Flash by FastLanguageModel, three layers, 4 rows in one: Unsloth adapts the experts beside the linear layers, whose
    names peft would take for the experts'. The shorter batch came last; two buffers of the longer one's inputs stayed."""
    peaks = estimate(with_layers("glm-4.7-flash", 3, monkeypatch), **GLM, batch_size=4, seq_len=seq_len).peaks
    assert peaks is not None
    expected = [ran - 2 * (4 * longer * 2_048 * 2) for ran in by_phase]
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(expected, rel=0.00002)
    assert peaks.reserved <= 6_681_526_272 <= 1.011 * peaks.reserved or longer  # of both lengths


def test_another_depth_and_length_of_that_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers and 3 x 1,700 tokens, of which no record was made; reserved bytes are those of the first step."""
    peaks = estimate(with_layers("glm-4.7-flash", 6, monkeypatch), **GLM, batch_size=3, seq_len=1700).peaks
    assert peaks is not None
    rehearsed = (9_006_380_544, 9_335_635_456, 8_084_635_648)
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(rehearsed, rel=0.00001)
    assert peaks.reserved == pytest.approx(9_619_636_224, rel=0.004)


def test_adapters_of_a_mixture_as_unsloth_counts_them() -> None:
    """`Trainable parameters = 9,551,872` of three layers, of which the first is dense; the line of the run above."""
    config = {**copy.deepcopy(load_config("glm-4.7-flash")), "num_hidden_layers": 3}
    assert estimate(config, **GLM).trainable_parameters == 9_551_872


QWEN_MOE = {
    **TRAINING, "kernels": "unsloth-compiled", "offload_checkpoints": False, "gradient_accumulation_steps": 1, "r": 32,
    "target_modules": "q_proj,k_proj,v_proj,o_proj", "target_parameters": GLM["target_parameters"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("seq_len", "by_phase", "before"),
    [
        (2048, (5_847_478_272, 6_201_481_216, 5_806_140_416), 0),
        (1500, (6_597_343_744, 6_244_530_176, 5_969_296_896), 163_140_608),
    ],
)
def test_experts_in_groups_between_checkpoints_of_torch(
    seq_len: int, by_phase: tuple[int, ...], before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three layers of Qwen3 30B A3B by FastLanguageModel, one row; transformers 5.3.0 and trl 0.22.2. A second trainer ran the
    shorter row, beside the states of the first one's optimizer (80,314,368 parameters). Reserved bytes are those of the first."""
    peaks = estimate(with_layers("qwen3-30b-a3b", 3, monkeypatch), **QWEN_MOE, batch_size=1, seq_len=seq_len).peaks
    assert peaks is not None
    expected = [ran - before for ran in by_phase]
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(expected, rel=0.00002)
    assert before or peaks.reserved == pytest.approx(6_276_775_936, rel=0.014)
