"""Inputs of checkpointed layers that wait on the host, in the analytic engine: hand sums, and the trace."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from tests.memory.engines import LLAMA, TOLERANCE, by_phase, phases, shallow
from tests.memory.families import T5

BATCH, TOKENS, LAYERS = 2, 128, 5
STATES = 2 * BATCH * TOKENS * LLAMA["hidden_size"]
"""Bytes of one layer's hidden states in bf16."""


def test_the_forward_keeps_none_and_the_host_keeps_all() -> None:
    """The first layer's input is the embedding, which its own leaf keeps: 4 of 5 go, and 5 wait on the host."""
    options: dict[str, Any] = {"method": "lora", "batch_size": BATCH, "seq_len": TOKENS}
    here, away = (phases(LLAMA, "analytic", **options, offload_checkpoints=x) for x in (False, True))
    assert here["forward"] - away["forward"] == (LAYERS - 1) * STATES
    assert (away["load"], away["step"]) == (here["load"], here["step"])
    assert estimate(LLAMA, **options, offload_checkpoints=True).assumptions["offloaded_bytes"] == LAYERS * STATES
    assert estimate(LLAMA, **options, offload_checkpoints=True, every_n_layers=2).assumptions["offloaded_bytes"] == 3 * STATES
    assert "offloaded_bytes" not in estimate(LLAMA, **options).assumptions


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (LLAMA, {"method": "qlora"}),
        (LLAMA, {"method": "lora", "every_n_layers": 2, "use_reentrant": True, "gradient_accumulation_steps": 2}),
        ("gpt2", {"method": "full", "attn_implementation": "eager"}),
        ({**T5, "num_layers": 4, "num_decoder_layers": 4}, {"method": "lora"}),
        ("bert-base-uncased", {"method": "lora", "padding": True, "every_n_layers": 3}),
        ("deberta-v3-base", {"method": "full", "task_type": "SEQ_CLS", "num_labels": 3}),  # it holds what every layer returns
    ],
)
def test_both_engines_agree(model: Any, options: dict[str, Any]) -> None:
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        pytest.importorskip(package)
    config = shallow(model, 4) if isinstance(model, str) else model
    job = {"batch_size": BATCH, "seq_len": TOKENS, "offload_checkpoints": True, **options}
    analytic, traced = (estimate(config, engine=engine, **job) for engine in ("analytic", "trace"))
    for phase, expected in by_phase(traced).items():
        assert by_phase(analytic)[phase] == pytest.approx(expected, rel=TOLERANCE), phase
    assert analytic.assumptions["offloaded_bytes"] == traced.assumptions["offloaded_bytes"]
