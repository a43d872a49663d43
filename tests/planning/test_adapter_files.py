"""An adapter config that names its base stands for the model in `fit`, `compare` and `sweep`, as in `estimate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peftplan
from tests.cli.run import run

LORA: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "smollm2-135m", "r": 32, "lora_alpha": 64,
    "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip
IA3: dict[str, Any] = {
    "peft_type": "IA3", "task_type": "CAUSAL_LM", "base_model_name_or_path": "smollm2-135m",
    "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"],
}  # fmt: skip
PER_RANK = 30 * (576 + 576 + 576 + 192)
"""Trained parameters of SmolLM2-135M's 30 layers for each rank on q_proj (576 to 576) and v_proj (576 to 192)."""


def test_fit_takes_the_base() -> None:
    named = peftplan.fit("smollm2-135m", gpu="t4", peft_config=LORA, keep="loss")
    assert peftplan.fit(gpu="t4", peft_config=LORA, keep="loss") == named
    assert named.plans[0].trainable_parameters == 32 * PER_RANK
    assert peftplan.fit(gpu="t4", peft_config=LORA, max="model").plans[0].model == "smollm2-135m"


def test_compare_begins_with_the_adapter_and_keeps_its_fields_for_its_type() -> None:
    rows = peftplan.compare(peft_config=LORA, methods=("dora", "qlora", "ia3", "lora")).rows
    trainable = {row.method: row.trainable_parameters for row in rows}
    assert list(trainable) == ["lora", "dora", "qlora", "ia3"]
    assert trainable["lora"] == trainable["qlora"] == 32 * PER_RANK
    assert trainable["dora"] == 32 * PER_RANK + 30 * (576 + 192)  # a magnitude per output
    assert trainable["ia3"] == peftplan.estimate("smollm2-135m", method="ia3").trainable_parameters
    assert all(row.error is None and row.adapter_bytes for row in rows)


def test_an_adapter_of_a_variant_is_not_compared_with_itself() -> None:
    """`lora` beside a DoRA adapter is without magnitudes."""
    dora, lora = peftplan.compare(peft_config={**LORA, "use_dora": True}, methods="lora").rows
    assert (dora.method, lora.method) == ("dora", "lora")
    assert dora.trainable_parameters == 32 * PER_RANK + 30 * (576 + 192)
    assert lora.trainable_parameters == 32 * PER_RANK


def test_a_sweep_over_adapters_takes_the_base_of_each() -> None:
    pytest.importorskip("numpy")
    other = {**LORA, "base_model_name_or_path": "gpt2", "target_modules": ["c_attn"]}
    rows = peftplan.sweep(peft_config=[LORA, IA3, other], batch_size=[1, 2]).records()
    assert [(row["model"], row["method"], row["batch_size"]) for row in rows] == [
        *(("smollm2-135m", "lora", size) for size in (1, 2)),
        *(("smollm2-135m", "ia3", size) for size in (1, 2)),
        *(("gpt2", "lora", size) for size in (1, 2)),
    ]
    for row, adapter in zip(rows[::2], (LORA, IA3, other), strict=True):
        assert row["trainable_parameters"] == peftplan.estimate(peft_config=adapter).trainable_parameters


@pytest.mark.parametrize("command", [("fit", "--gpu", "t4"), ("compare", "--method", "lora"), ("sweep", "--bs", "1,2")])
def test_the_commands(command: tuple[str, ...], tmp_path: Path) -> None:
    if command[0] == "sweep":
        pytest.importorskip("numpy")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(LORA), encoding="utf-8")
    done = run(*command, "--peft-config", str(path))
    assert (done.code, "smollm2-135m" in done.out) == (0, True)
    path.write_text(json.dumps({**LORA, "base_model_name_or_path": None}), encoding="utf-8")
    for arguments in (("--peft-config", str(path)), ()):
        refused = run(*command, *arguments)
        assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
        assert "base" in refused.err
