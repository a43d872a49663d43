"""Reserved bytes of both engines: where the analytic events come in the trace's order, the allocator makes the same of them."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from tests.memory.engines import shallow

PLAIN: dict[str, Any] = {"trainer": "plain"}
FULL: dict[str, Any] = {"method": "full", "batch_size": 4, "seq_len": 512, "gradient_checkpointing": False}
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "workspaces are taken by the first products": (shallow("gpt2"), {"method": "lora", "batch_size": 4, **PLAIN}),
    "a quantized load goes by name, though no layer is quantized": (shallow("falcon-7b", 3), {"method": "lora", "quant": "int8"}),
    "logits before a soft cap go with their name": (shallow("gemma-2-2b"), {"method": "lora", **PLAIN}),
    "buckets of distances, the order of states, what a checkpointed layer holds": (
        shallow("t5-small"),
        {**FULL, "batch_size": 8, "gradient_checkpointing": True},
    ),
    "addmm's gradients and what a call holds": (shallow("pythia-160m"), FULL),
}


@pytest.mark.parametrize("job", JOBS)
def test_reserved_is_the_traces_to_the_byte(job: str) -> None:
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module)
    config, options = JOBS[job]
    analytic, traced = (
        peftplan.estimate(config, engine=engine, **{"seq_len": 256, **options}).peaks for engine in ("analytic", "trace")
    )
    assert analytic is not None
    assert traced is not None
    assert analytic.replayed.reserved == traced.reserved
