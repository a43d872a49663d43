"""Logits in chunks against the recipes of torchtune 0.6.1, rehearsed (`tools.rehearsed_recipes`, torchao 0.10, torch 2.13)."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import peftplan
from peftplan.job.configs.read import read_text
from tests.cli.run import run
from tools.rehearsed_jobs import compared, read

ROWS = read(Path(__file__).with_name("torchtune_0_6_1.jsonl"))


def test_formulas_hold_what_recipes_hold() -> None:
    """Per cent. Rows of 1,001 tokens leave blocks that the allocator does not split."""
    rows = [(row, drift) for _, row, drift in compared(ROWS, ("analytic",)) if drift is not None]
    assert len(rows) == len(ROWS)
    for row, drift in rows:
        assert abs(drift["allocated"]) <= (0.1 if "1001" in str(row["job"]) else 0.01)
        assert abs(drift["reserved"]) <= 1.3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_has_no_peak_on_several_gpus(method: str) -> None:
    """Rehearsed with llama-3.1-8b, LoRA on two GPUs holds 9 % more in backward than the formula said, full fine-tuning on four
    1.3 %, and with checkpoints it reserves 9 % more: release 0.6.1 loads shards otherwise.
    """
    options = "llama-3.1-8b --trainer torchtune --loss torchtune-chunked --strategy fsdp2 --gpus 4 --gradient-checkpointing"
    assert "no formula yet" in run("estimate", *shlex.split(options), "--method", method).out


CONFIG = """
model: {_component_: torchtune.models.llama3_2.llama3_2_1b}
checkpointer: {checkpoint_dir: /tmp/Llama-3.2-1B-Instruct/}
loss: {_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}
batch_size: 1
dtype: bf16
"""


@pytest.mark.parametrize(
    ("changed", "bound"),
    [
        (CONFIG, None),
        (CONFIG + "enable_activation_checkpointing: true\n", None),
        (CONFIG.replace("llama3_2_1b", "lora_llama3_2_1b, lora_attn_modules: [q_proj]"), None),
        (
            CONFIG.replace("OutputLoss}", "OutputLoss, num_output_chunks: 4}") + "enable_activation_checkpointing: true\n",
            "unknown",
        ),
    ],
)
def test_recipes_that_name_it(changed: str, bound: str | None) -> None:
    plan = read_text(changed, file="a.yaml")
    assert plan.options["loss"] == "torchtune-chunked"
    assert "torchtune up to 0.6.1" in plan.assumed["recipe"]
    assert peftplan.estimate(config=plan).config["bound"] == bound  # type: ignore[index]
