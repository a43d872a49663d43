"""Text parts beside a tower, which torch compiles for Unsloth: rehearsals of its own loading and training, without pictures.

unsloth and unsloth_zoo 2026.10.9, trl 0.22.2, torch 2.13.0 on an emulated A100, a collator that keeps rows apart. Each row: peaks
of forward, backward and step in a later step than the first.
"""

from __future__ import annotations

import pytest

from peftplan import estimate
from peftplan.job import compiled_layers
from tests.memory.test_compiled_text_parts import TRAINING, with_layers


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
