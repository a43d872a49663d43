"""Gated delta rules by flash-linear-attention: what a layer keeps, and what traces with it and programs held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import peftplan
import tests.memory.test_delta_rule as models
from tests.memory.test_convolutions import phases
from tools.rehearsed_jobs import compared, read

TRACED = read(Path(__file__).with_name("delta_kernels.jsonl"))
"""Traces of transformers 5.24 with flash-linear-attention 0.5.2, whose kernels launched nothing."""
ROWS = read(Path(__file__).parents[1] / "rehearse" / "delta_kernels.jsonl")
JOB: dict[str, Any] = {"method": "lora", "kernels": "fla", "seq_len": 150, "gradient_checkpointing": False}


def kept(**options: Any) -> dict[str, int]:
    """Operation of a delta rule → bytes that are alive at the peak of forward."""
    peaks = peftplan.estimate(models.DENSE, **JOB | options).peaks
    assert peaks is not None
    lines = [line for line in peaks.ledgers["forward"].lines if line.category == "activations"]
    return {line.name.rpartition(".")[2]: line.bytes() for line in lines if "linear_attn" in line.name}


def test_what_a_layer_keeps() -> None:
    """150 tokens in each of two layers, 2 B each: values of 48 numbers in 8 heads, normed queries and keys of 32 in 4, and
    64 numbers of a chunk in 8."""
    by_kernel = kept()
    assert by_kernel["linear_attn contiguous"] == 2 * 150 * 8 * 48 * 2
    assert by_kernel["linear_attn l2norm"] == 2 * 150 * 4 * (32 + 32) * 2
    assert by_kernel["linear_attn A"] == 2 * 150 * 8 * 64 * 2


@pytest.mark.parametrize("row", TRACED, ids=lambda row: f"{row['config']} {row['options']['method']}")
def test_as_traced(row: dict[str, Any]) -> None:
    assert phases(getattr(models, row["config"]), "analytic", row["options"]) == pytest.approx(row["traced"], rel=0.0002)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["job"])
def test_as_programs(row: dict[str, Any]) -> None:
    """Their first step, in which Triton times no kernel, needs no more than the others."""
    ((_, _, drift),) = compared([row], ("analytic",))
    assert drift is not None
    assert max(abs(drift[phase]) for phase in ("allocated", "forward", "backward", "step")) <= 0.3
    assert abs(drift["reserved"]) <= 3.0


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"kernels": "fla,liger"}, "flash-linear-attention's function with other kernels"),
        ({"gpus": 2, "strategy": "fsdp2"}, "with flash-linear-attention, under FSDP2"),
        ({"gpus": 2, "strategy": "zero2", "trainer": "trl"}, "with flash-linear-attention, under ZeRO-2"),
        ({"gpus": 2, "strategy": "fsdp1", "kernels": None}, "in torch's operations, under FSDP1"),
        ({"gpus": 2, "strategy": "ddp", "kernels": None, "trainer": "plain"}, "in torch's operations, under DDP"),
        ({"padding": True}, "padding"),
    ],
    ids=str,
)
def test_what_was_not_compared_has_no_formula(options: dict[str, Any], missing: str) -> None:
    estimated = peftplan.estimate(models.DENSE, **JOB | options)
    assert estimated.peaks is None
    assert missing in str(estimated.not_modelled)
