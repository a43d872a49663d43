"""A record that is right in every field, for tests to vary."""

from __future__ import annotations

from typing import Any

from peftplan.accuracy.records import Record

OPTIONS: dict[str, Any] = {
    "trainer": "plain",
    "dtype": "bf16",
    "adapter_dtype": "fp32",
    "autocast": "none",
    "optim": "adamw_torch",
    "batch_size": 1,
    "seq_len": 128,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "attn_implementation": "sdpa",
    "loss": "full",
    "padding": False,
    "keep_outputs": True,
    "keep_gradients": False,
    "kbit_prepare": False,
    "use_cache": False,
}

PAYLOAD: dict[str, Any] = {
    "schema_version": 1,
    "id": "example",
    "run": {"model": "llama-2-7b", "method": "lora", "method_config": {"r": 8}, "options": OPTIONS},
    "circumstances": {
        "gpu": "NVIDIA A100-SXM4-80GB",
        "gpu_id": "a100-sxm-80gb",
        "versions": {"torch": "2.13.0"},
        "source": "tests",
        "licence": "Apache-2.0",
    },
    "outcome": "ok",
    "covers": "steady-step",
    "peaks": {"by_phase": {"forward": {"allocated": 10, "reserved": 20}}, "overall": {"allocated": 15}},
}


def record(**changes: Any) -> Record:
    """The example with some of its top-level fields replaced."""
    return Record.model_validate({**PAYLOAD, **changes})
