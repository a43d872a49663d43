"""Vision-language models that write completions themselves and train on them in layers that torch compiles, rows with pictures.

Unsloth's own GRPOTrainer on an emulated A100, of whose rows the pictures are left out where the model reads them: unsloth and
unsloth_zoo 2026.10.9, transformers 4.57.1, trl 0.26.2, bitsandbytes 0.50.2, torch 2.13.0.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from peftplan import estimate
from peftplan.job import compiled_layers
from peftplan.job.configs.read import read_text
from tests.memory.test_compiled_text_parts import OF_TEXT, ROWS, with_layers

MODEL = "qwen3-vl-8b-instruct"
GRPO: dict[str, Any] = {
    "method": "qlora", "r": 16, "target_modules": OF_TEXT, "trainer": "trl-grpo", "kernels": "unsloth-rows", "loss": "unsloth",
    "gradient_checkpointing": True, "offload_checkpoints": True, "autocast": "bf16", "use_reentrant": True,
    "adapter_dtype": "fp32", "optim": "adamw_8bit", "kbit_prepare": False,
}  # fmt: skip
SKIPPED: list[str] = next(row["in_16_bits"] for row in ROWS if row["model"] == MODEL)
REHEARSED = [
    (6, 1500, 40, (4_216_942_080, 4_533_152_768), 4_812_963_840),
    (5, 1224, 200, (4_065_647_616, 4_290_204_160), 4_586_471_424),
]
"""Layers; tokens of a row, and of its completion; peaks of forward and backward in the second step; reserved bytes of all."""


@pytest.mark.parametrize(("layers", "seq_len", "completion", "by_phase", "reserved"), REHEARSED)
def test_rows_with_pictures_as_unsloth_ran(
    layers: int, seq_len: int, completion: int, by_phase: tuple[int, int], reserved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is that of supervised training. The cache in which the completions were written lasts through the step: 4 kB a
    layer and token."""
    config = with_layers(MODEL, layers, monkeypatch)
    config["vision_config"]["deepstack_visual_indexes"] = [0, 1]
    (row,) = compiled_layers.load("compiled_layers.json", list)
    of_layers = "model.language_model.layers."
    skipped = ["lm_head", "model.visual", f"{of_layers}1.mlp", f"{of_layers}3.self_attn"]
    others = [([1], *row["others"][0][1:]), ([3], *row["others"][1][1:])]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: [{**row, "in_16_bits": skipped, "others": others}])
    job = {**GRPO, "quant_skip_modules": ",".join(skipped), "batch_size": 2, "num_generations": 2}
    peaks = estimate(config, **job, seq_len=seq_len, max_completion_length=completion).peaks
    assert peaks is not None
    assert peaks.assumed["images_per_sample"] == 0
    assert [peaks.by_phase[phase] for phase in ("forward", "backward")] == pytest.approx(by_phase, rel=0.0002)
    assert reserved <= peaks.reserved <= 1.025 * reserved


@pytest.mark.parametrize(
    ("seq_len", "by_phase", "off"),
    [(1500, (3_672_444_416, 3_933_911_040), 0.0002), (1140, (3_574_441_472, 3_780_285_440), 0.003)],
)
def test_linear_attention_keeps_no_cache(
    seq_len: int, by_phase: tuple[int, ...], off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight layers of Qwen3.5 4B beside transformers 5.2.0 and trl 0.22.2, in one program: behind rows of 1,500 tokens, buffers
    of offloaded inputs stay as large for the shorter ones. All steps reserved 4,305,453,056 bytes."""
    config = with_layers("qwen3.5-4b", 8, monkeypatch)
    (row,) = compiled_layers.load("compiled_layers.json", list)
    adapted = {name: 2 if layers == len(row["others"][0][0]) else 6 for name, layers in row["adapted"].items()}
    rows = [{**row, "timed": 6, "adapted": adapted, "others": [([3, 7], *row["others"][0][1:])]}]
    monkeypatch.setattr(compiled_layers, "load", lambda *_: rows)
    of_text = r".*language_model\..*(attn|mlp)\.(\w+_proj|in_proj_\w+)"
    job = {**GRPO, "method": "lora", "target_modules": of_text, "batch_size": 2, "num_generations": 2}
    peaks = estimate(config, **job, seq_len=seq_len, max_completion_length=40).peaks
    assert peaks is not None
    assert [peaks.by_phase[phase] for phase in ("forward", "backward")] == pytest.approx(by_phase, rel=off)
    assert seq_len < 1500 or 4_305_453_056 <= peaks.reserved <= 1.02 * 4_305_453_056


def test_three_rows_have_no_formula() -> None:
    """A rehearsal of three, of 120 tokens each, ended without the cache: 2.4 % less in backward."""
    result = estimate(MODEL, **{**GRPO, "quant_skip_modules": ",".join(SKIPPED), "batch_size": 3, "num_generations": 3})
    assert result.peaks is None
    assert "of rows with pictures, but two of Qwen3-VL or Qwen3.5" in result.not_modelled[0]


NOTEBOOK = """
from unsloth import FastVisionModel
model, tokenizer = FastVisionModel.from_pretrained(model_name="unsloth/Qwen3-VL-8B-Instruct-unsloth-bnb-4bit",
    max_seq_length=16384, load_in_4bit=True, fast_inference={vllm})
model = FastVisionModel.get_peft_model(model, finetune_vision_layers=False, finetune_language_layers=True,
    finetune_attention_modules=True, finetune_mlp_modules=True, r=16, lora_alpha=16, lora_dropout=0, bias="none",
    use_gradient_checkpointing="unsloth")
args = GRPOConfig(optim="adamw_8bit", per_device_train_batch_size=1, gradient_accumulation_steps=1, num_generations=2,
    max_prompt_length=1024, max_completion_length=1024, loss_type="{loss}")
trainer = GRPOTrainer(model=model, args=args, processing_class=tokenizer, reward_funcs=[reward], train_dataset=dataset)
trainer.train()
"""


@pytest.mark.parametrize(("vllm", "loss", "peak"), [(False, "dr_grpo", True), (True, "dr_grpo", False), (False, "grpo", False)])
def test_its_notebook(vllm: bool, loss: str, peak: bool) -> None:
    """Beside vLLM, and with a reference, it was not rehearsed."""
    cell = {"cell_type": "code", "source": [NOTEBOOK.format(vllm=vllm, loss=loss)]}
    plan = read_text(json.dumps({"cells": [cell]}), file="a.ipynb")
    result = estimate(config=plan)
    assert result.trainable_parameters == 43_646_976
    assert (result.peaks is not None and result.bound is None) is peak
    if peak:
        assert (plan.options["batch_size"], plan.options["seq_len"]) == (2, 2048)
        assert result.peaks is not None
        assert result.peaks.scope == "text"
