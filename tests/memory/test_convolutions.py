"""Layers with convolutions: against the trace, phase by phase and without the tails of blocks, and against rehearsed programs."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from pathlib import Path

from peftplan import estimate
from peftplan.job.sources import load_config
from tests.memory.engines import shallow
from tests.memory.test_later_decoders import JOBS
from tools.rehearsed_jobs import compared, engines, read

ON, OFF = {"gradient_checkpointing": True}, {"gradient_checkpointing": False}
SMALL, ODD = {"batch_size": 2, "seq_len": 256}, {"batch_size": 3, "seq_len": 250}
LAYER_TYPES = ["conv", "conv", "full_attention", "conv"]
LFM2: dict[str, Any] = {**load_config("lfm2-350m"), "num_hidden_layers": 4, "layer_types": LAYER_TYPES, "vocab_size": 4000}
DEBERTA: dict[str, Any] = {**shallow("deberta-v2-xxlarge", 3), "vocab_size": 4000}
CLASSIFYING: dict[str, Any] = {"task_type": "SEQ_CLS", "num_labels": 3, "attn_implementation": "eager", "trainer": "transformers"}
TOLERANCE = 0.0002
"""Small integers that only the trace has."""


def phases(config: dict[str, Any], engine: str, options: dict[str, Any]) -> dict[str, int]:
    """Bytes of each phase, without what blocks hold beyond their tensors."""
    peaks = estimate(config, engine=engine, **options).peaks
    assert peaks is not None
    return {
        phase: sum(line.bytes() for line in ledger if line.name != "tails of unsplit blocks")
        for phase, ledger in peaks.ledgers.items()
    }


@pytest.mark.parametrize("job", JOBS)
def test_lfm2(job: str) -> None:
    options = {"trainer": "transformers", **JOBS[job]}
    assert phases(LFM2, "analytic", options) == pytest.approx(phases(LFM2, "trace", options), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("job", "config"),
    [
        ({"method": "full", "dtype": "fp32", "autocast": "fp16", **OFF, **SMALL}, {}),
        ({"method": "full", "dtype": "fp32", "autocast": "bf16", **OFF, **ODD, "padding": True}, {}),
        ({"method": "lora", "target_modules": "attention", **OFF, **SMALL}, {}),
        ({"method": "lora", **ON, **ODD, "trainer": "plain"}, {"conv_act": "tanh"}),
    ],
    ids=["fp16", "padding", "LoRA", "LoRA, checkpoints, tanh"],
)
def test_deberta_with_a_convolution(job: dict[str, Any], config: dict[str, Any]) -> None:
    ours, traced = (phases(DEBERTA | config, engine, CLASSIFYING | job) for engine in ("analytic", "trace"))
    assert ours == pytest.approx(traced, rel=TOLERANCE)


def test_lfm2_as_a_program() -> None:
    """torch copies a convolution's input of three dims that lies by tokens, which no trace sees: rehearsed, to 0.08 %."""
    rows = read(Path(__file__).parents[1] / "rehearse" / "convolutions.jsonl")
    drifts = {row["job"]: drift for engine, row, drift in compared(rows, engines(rows)) if engine == "analytic"}
    assert len(drifts) == len(rows) == 2
    for drift in drifts.values():
        assert drift is not None
        assert abs(drift["allocated"]) <= 0.08
        assert drift["reserved"] == 0
