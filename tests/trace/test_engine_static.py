"""What lasts in a trace, category by category, is what the analytic engine counts from formulas: two independent ways to it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import peftplan
from tests.trace.engine_case import llama, lora, traced

LASTING = ("weights", "adapter_weights", "quant_state", "buffers", "gradients", "optimizer_states")
TARGETS = ["q_proj", "down_proj"]
NF4 = {"quant": "nf4", "double_quant": True, "compute_dtype": "bf16"}
ODD = {"intermediate_size": 700, "vocab_size": 1003}
"""Sizes that no power of two divides, so that every tensor is rounded up."""


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"trainer": "plain"}),
        ("lora", {"trainer": "plain", "adapter_dtype": "bf16"}),
        ("lora", {"trainer": "transformers", "dtype": "fp16", "autocast": "fp16"}),
        ("full", {"trainer": "plain"}),
        ("full", {"trainer": "transformers", "optim": "adamw_bnb_8bit"}),
        ("full", {"trainer": "transformers", "optim": "paged_adamw_32bit"}),
        ("full", {"trainer": "plain", "optim": "adafactor"}),
        ("lora", {"trainer": "plain", "optim": "sgd", "optim_args": "momentum=0.9"}),
        ("lora", {"trainer": "transformers", **NF4}),
        ("lora", {"trainer": "plain", "kbit_prepare": False, **NF4}),
        ("lora", {"trainer": "plain", "quant": "fp4", "compute_dtype": "bf16"}),
        ("lora", {"trainer": "plain", "quant": "int8"}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_lasting_bytes_and_counts(method: str, options: dict[str, Any], tied: bool) -> None:
    config = llama(tie_word_embeddings=tied, **ODD)
    adapter = {} if method == "full" else {"r": 8, "target_modules": TARGETS}
    analytic = peftplan.estimate(config, method=method, seq_len=48, **adapter, **options)
    trace = traced(config, lora(TARGETS) if adapter else None, seq_len=48, **options)

    counted = analytic.static.by_category()
    at_step = trace.by_category("step")
    assert {c: at_step.get(c, 0) for c in LASTING} == {c: counted[c] for c in LASTING}
    assert (trace.num_trainable, trace.num_total) == (analytic.trainable_parameters, analytic.total_parameters)
    assert trace.managed_bytes == analytic.managed_bytes


def test_gradients_are_gone_in_forward_unless_kept() -> None:
    dropped = traced(llama(), lora(TARGETS), trainer="plain", seq_len=16)
    kept = traced(llama(), lora(TARGETS), trainer="plain", seq_len=16, keep_gradients=True)
    assert "gradients" not in dropped.by_category("forward")
    # q_proj: A 8×256, B 256×8; down_proj: A 8×704, B 256×8; fp32, 2 layers: 4 × 2 × (3 × 2048 + 5632) = 94,208 B
    assert kept.by_category("forward")["gradients"] == 94_208


def test_accumulated_gradients_live_in_later_forwards() -> None:
    trace = traced(llama(), lora(TARGETS), trainer="plain", seq_len=16, gradient_accumulation_steps=2)
    assert trace.by_category("forward")["gradients"] == 94_208
