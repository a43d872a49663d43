"""Who calls AdaLoRA's `update_and_allocate`: a loop does, and no trainer."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan import Script

ONE: dict[str, Any] = {
    "method": "adalora",
    "init_r": 8,
    "target_r": 4,
    "target_modules": ["q_proj"],
    "batch_size": 2,
    "seq_len": 32,
}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000,
}  # fmt: skip
SENSITIVITIES = 3 * (8_192 + 8_192 + 512)
"""Three like each parameter, in fp32: A and B are (8, 256) and (256, 8), E (8, 1) takes a block of 512 B."""


@pytest.mark.parametrize("engine", ["analytic", "trace"])
@pytest.mark.parametrize("trainer", ["transformers", "trl", "plain"])
def test_sensitivities_are_there_where_ranks_are_updated(engine: str, trainer: str) -> None:
    pytest.importorskip("peft")
    runs = [
        peftplan.estimate(LLAMA, engine=engine, trainer=trainer, script=script, **ONE).peaks
        for script in (Script(allocates_ranks=False), Script(), Script(allocates_ranks=True))
    ]
    without, by_default, updated = (peaks.by_phase["forward"] for peaks in runs if peaks is not None)
    assert updated - without == SENSITIVITIES
    assert by_default == (updated if trainer == "plain" else without)
