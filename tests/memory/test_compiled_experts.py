"""Recorded layers whose experts are linear layers, run one after the other, for Unsloth beside transformers 4."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peftplan import estimate
from peftplan.datafiles import load
from peftplan.job import compiled_layers
from peftplan.job.configs.read import read_text

LAYERS = 3
MODULES = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
OF_ERNIE: dict[str, Any] = {
    "method": "qlora", "r": 8, "target_modules": MODULES, "kernels": "unsloth-compiled,unsloth-experts", "trainer": "trl",
    "loss": "unsloth", "gradient_checkpointing": True, "use_reentrant": True, "offload_checkpoints": True, "use_cache": False,
    "gradient_accumulation_steps": 2, "optim": "adamw_8bit", "adapter_dtype": "fp32", "dtype": "bf16", "autocast": "bf16",
    "kbit_prepare": False, "lora_dropout": 0.0, "batch_size": 2, "seq_len": 1056,
}  # fmt: skip
PHASES, RESERVED = {"forward": 5_800_187_904, "backward": 2_111_162_368, "step": 1_589_200_896}, 6_144_655_360
"""Peaks of the second step of Unsloth's FastModel over three layers of ERNIE 4.5 21B A3B on an emulated A100: unsloth and
unsloth_zoo 2026.10.9, transformers 4.56.2, trl 0.22.2, torch 2.10.0 with Triton 3.6.0, which refuses the kernel of the program's
loss. That of backward is of the layers: where the thread of autograd is late, the softmax of the loss lasts until they begin
(2,752,973,312)."""


def test_experts_that_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """13,602,816 of 1,977,407,104 parameters, as Unsloth printed; the router is in 4 bits too."""
    (row,) = (row for row in load("compiled_layers.json", list[dict[str, Any]]) if row["model"] == "ernie-4.5-21b-a3b-pt")
    adapted = dict.fromkeys(row["adapted"], 1 + (LAYERS - 1) * 65)
    monkeypatch.setattr(compiled_layers, "load", lambda *_: [{**row, "model": "ernie4_5_moe", "adapted": adapted}])
    config = {"architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "dtype": "bfloat16"}
    result = estimate({**config, "num_hidden_layers": LAYERS}, **OF_ERNIE, gpu="a100-40gb")
    assert (result.trainable_parameters, result.total_parameters) == (13_602_816, 1_977_407_104)
    assert result.peaks is not None
    assert {phase: result.peaks.by_phase[phase] for phase in PHASES} == pytest.approx(PHASES, rel=0.0003)
    assert result.peaks.reserved == RESERVED


NOTEBOOK = """
!pip install transformers==4.56.2
!pip install --no-deps trl==0.22.2
from unsloth import FastModel
model, tokenizer = FastModel.from_pretrained("unsloth/ERNIE-4.5-21B-A3B-PT", max_seq_length=2048, load_in_4bit=True)
model = FastModel.get_peft_model(model, r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    "down_proj"], lora_alpha=16, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth")
trainer = SFTTrainer(model=model, args=SFTConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=60,
    optim="adamw_8bit"))
trainer.train()
"""


def of_notebook(text: str) -> Any:
    """The estimate of a notebook of one cell."""
    plan = read_text(json.dumps({"cells": [{"cell_type": "code", "source": [text]}]}), file="a.ipynb")
    return estimate(config=plan)


def test_the_notebook_of_ernie_has_a_peak() -> None:
    """Its output: 177,545,216 parameters, and 11.576 GiB reserved once the model is loaded and the adapters are made."""
    result = of_notebook(NOTEBOOK)
    assert (result.trainable_parameters, result.bound) == (177_545_216, None)
    assert result.peaks is not None
    assert result.peaks.by_phase["load"] == pytest.approx(11.576 * 2**30, rel=0.006)
    assert result.peaks.phase == "forward"


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("==4.56.2", "==5.3.0"),
        ("r=8", "r=16"),
        ("4bit=True", "4bit=False"),
        ("max_steps=60", "packing=True"),
        ("FastModel", "FastLanguageModel"),
    ],
)
def test_other_notebooks_of_ernie_have_no_record(written: str, instead: str) -> None:
    result = of_notebook(NOTEBOOK.replace(written, instead))
    assert result.peaks is None or result.bound is not None
