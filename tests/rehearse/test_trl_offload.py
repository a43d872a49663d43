"""TRL's `activation_offloading` beside checkpoints, against SFTTrainer on the emulated card."""

from __future__ import annotations

from pathlib import Path

import peftplan
from tools.rehearsed_jobs import compared, read

ROWS = read(Path(__file__).with_name("trl_offload.jsonl"))
BESIDE_LIGER = 3.0
"""Per cent of reserved bytes beside Liger's kernels."""
ALONE = {"model": "qwen3-0.6b", "trainer": "trl", "kernels": "trl-offload"}


def test_formulas_hold_what_sft_trainer_holds() -> None:
    drifts = [drift for _, _, drift in compared(ROWS, ("analytic",)) if drift is not None]
    assert len(drifts) == len(ROWS)
    assert max(abs(drift["allocated"]) for drift in drifts) <= 0.015
    *used, drawn, first, second = [drift["reserved"] for drift in drifts]
    assert max(map(abs, used)) <= 0.5
    assert -1.8 <= drawn < 0  # rehearsed afterwards
    assert max(abs(first), abs(second)) <= BESIDE_LIGER


def test_the_rest_was_not_rehearsed() -> None:
    """Of LoRA over 4 bits alone, and beside no other kernels than Liger's."""
    for kernels in ("trl-offload", "trl-offload,liger"):
        assert peftplan.estimate(**ALONE | {"kernels": kernels}, method="qlora").peaks is not None
    for options in ({"method": "lora"}, {"method": "qlora", "kernels": "trl-offload,unsloth"}, {"method": "qlora", "gpus": 2}):
        assert peftplan.estimate(**ALONE | options).peaks is None
