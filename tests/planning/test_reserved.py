"""Reserved bytes of both engines: where the analytic events come in the trace's order, the allocator makes the same of them."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from tests.memory.engines import shallow

FALCON = shallow("falcon-7b", 3)
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "workspaces are taken by the first products": (shallow("gpt2"), {"method": "lora", "trainer": "plain", "batch_size": 4}),
    "a quantized model is loaded by name, though none of its layers is quantized": (FALCON, {"method": "lora", "quant": "int8"}),
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
