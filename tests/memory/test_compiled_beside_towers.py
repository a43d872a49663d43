"""Text parts beside a tower, which torch compiles for Unsloth: rehearsals of its own loading and training, without pictures.

unsloth and unsloth_zoo 2026.10.9, trl 0.22.2, torch 2.13.0 on an emulated A100, a collator that keeps rows apart. Each row: peaks
of forward, backward and step in a later step than the first.
"""

from __future__ import annotations

import pytest

from peftplan import estimate
from peftplan.job import compiled_layers
from tests.memory.test_compiled_text_parts import OF_TEXT, QWEN_35, TRAINING, with_layers


@pytest.mark.parametrize(
    ("sizes", "by_phase", "off"),
    [
        ((2, 2048), (2_346_324_992, 2_492_289_024, 1_985_873_408), 0.0004),
        ((2, 1500), (2_323_681_792, 2_354_201_088, 1_985_847_296), 0.005),
        ((3, 1100), (2_329_735_680, 2_391_377_408, 1_985_854_976), 0.004),
    ],
)
def test_the_same_layers_behind_a_tower(
    sizes: tuple[int, int], by_phase: tuple[int, ...], off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LFM2.5-VL 1.6B by FastVisionModel beside transformers 4.57.1, text alone, six layers: LFM2 1.2B's with the fused loss. One
    program, of which no record was made; buffers of its first, longest batch stay."""
    config = with_layers("lfm2.5-vl-1.6b", 6, monkeypatch)
    (row,) = compiled_layers.load("compiled_layers.json", list)
    monkeypatch.setattr(compiled_layers, "load", lambda *_: [{**row, "adapted": dict.fromkeys(row["adapted"], 2)}])
    names = r".*language_model\..*(self_attn|feed_forward)\.(q_proj|k_proj|v_proj|out_proj|w1|w2|w3)"
    job = {**TRAINING, "r": 16, "target_modules": names, "gradient_accumulation_steps": 1}
    result = estimate(config, **job, batch_size=sizes[0], seq_len=sizes[1])
    peaks = result.peaks
    assert peaks is not None
    assert result.trainable_parameters == 3_375_104
    assert [peaks.by_phase[phase] for phase in ("forward", "backward", "step")] == pytest.approx(by_phase, rel=off)
    assert sizes != (2, 2048) or peaks.reserved == 2_850_029_568


@pytest.mark.parametrize(
    ("layers", "seq_len", "by_phase", "off", "reserved"),
    [
        (7, 2048, (2_622_657_536, 2_404_551_680, 2_040_395_264), 0.0001, 2_759_852_032),
        (7, 1500, (2_607_468_032, 2_306_731_520, 2_040_369_664), 0.004, None),
        (7, 1100, (2_596_377_088, 2_248_330_240, 2_040_349_696), 0.005, None),
        (9, 1600, (2_745_160_704, 2_450_130_432, 2_177_396_224), 0.008, None),
    ],
)
def test_a_repository_whose_layers_in_16_bits_are_inferred(
    layers: int, seq_len: int, by_phase: tuple[int, ...], off: float, reserved: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3 4B by FastVisionModel beside transformers 4.56.2, text alone, one row: one layer has its MLP, one its attention in
    16 bits. The record is of 1,500 and 1,100 tokens; where 2,048 came first, its buffers stay, and of nine layers what Python
    collects late. The adapters of a tower of two layers have neither gradients nor states."""
    config = with_layers("gemma-3-4b-pt", layers, monkeypatch)
    config["vision_config"]["num_hidden_layers"] = 2
    (row,) = compiled_layers.load("compiled_layers.json", list)
    of_layers = "model.language_model.layers."
    skipped = ["lm_head", "model.vision_tower", f"{of_layers}1.mlp", f"{of_layers}3.self_attn"]
    others = [([1], *row["others"][0][1:]), ([3], *row["others"][1][1:])]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: [{**row, "in_16_bits": skipped, "others": others}])
    changed = {"method": "qlora", "r": 16, "optim": "adamw_torch_fused", "gradient_accumulation_steps": 1}
    job = {**TRAINING, **changed, "target_modules": OF_TEXT, "quant_skip_modules": ",".join(skipped)}
    result = estimate(config, **job, batch_size=1, seq_len=seq_len)
    peaks = result.peaks
    assert peaks is not None
    tower = 644_096  # of the 6,779,904 and 8,532,992 trainable parameters that Unsloth printed
    assert result.trainable_parameters == {7: 6_779_904, 9: 8_532_992}[layers] - tower
    beside = [peaks.by_phase[phase] + 4 * tower for phase in ("forward", "backward", "step")]
    assert beside == pytest.approx(by_phase, rel=off)
    assert reserved is None or peaks.reserved + 4 * tower == pytest.approx(reserved, rel=0.016)


@pytest.mark.parametrize(
    ("layers", "sizes", "by_phase", "off", "reserved"),
    [
        (8, (2, 2048), (1_514_359_296, 1_427_842_560, 971_867_136), 0.0012, 1_725_956_096),
        (12, (2, 1800), (1_684_066_304, 1_556_563_968, 1_154_007_040), 0.0012, 1_851_785_216),
        (12, (1, 2048), (1_667_698_688, 1_381_768_192, 1_153_968_640), 0.006, None),
    ],
)
def test_the_smallest_model_of_linear_attention(
    layers: int,
    sizes: tuple[int, int],
    by_phase: tuple[int, ...],
    off: float,
    reserved: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Qwen3.5 0.8B by FastVisionModel beside transformers 5.2.0, text alone. The record is of eight layers; the program of twelve
    ran 2 x 1,800 tokens first, whose buffers stay. Adapters of the tower's two layers have no gradient in these runs."""
    config = with_layers("qwen3.5-0.8b", layers, monkeypatch)
    (row,) = compiled_layers.load("compiled_layers.json", list)
    attending = range(3, layers, 4)
    adapted = {name: len(attending) if n == 6 else layers - len(attending) for name, n in row["adapted"].items()}
    changed = {**row, "timed": layers - 2, "adapted": adapted, "others": [(tuple(attending), *row["others"][0][1:])]}
    monkeypatch.setattr(compiled_layers, "load", lambda *_: [changed])
    result = estimate(config, **{**QWEN_35, "gradient_accumulation_steps": 1}, batch_size=sizes[0], seq_len=sizes[1])
    peaks = result.peaks
    assert peaks is not None
    assert result.trainable_parameters == {8: 4_000_768, 12: 5_804_544}[layers]
    tower = 2 * 16 * (768 + 2304 + 2 * 768 + 2 * (768 + 3072)) * (4 + 2)
    beside = [peaks.by_phase[phase] - tower for phase in ("forward", "backward", "step")]
    assert beside == pytest.approx(by_phase, rel=off)
    assert reserved is None or peaks.reserved - tower == pytest.approx(reserved, rel=0.012)
