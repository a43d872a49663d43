"""Reentrant checkpointing against torch's own on a real tiny model on the CPU."""

from __future__ import annotations

from functools import cache

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
import transformers

from peftplan.trace.engine import Traced
from tests.trace.engine_case import HIDDEN, llama, lora, traced
from tests.trace.storages import Storages

SEQ = 512
STATES = 2 * SEQ * HIDDEN
"""Bytes of one layer's hidden states in bf16."""


@cache
def in_trace(reentrant: bool, layers: int = 2) -> Traced:
    options = {"trainer": "plain", "gradient_checkpointing": True, "keep_outputs": False, "use_cache": False}
    return traced(llama(layers, vocab_size=256), None, seq_len=SEQ, use_reentrant=reentrant, **options)


@cache
def on_the_cpu(reentrant: bool) -> tuple[int, int]:
    """Bytes that the forward leaves, and the peak of the backward above them."""
    fields = {k: v for k, v in llama(vocab_size=256).items() if k != "architectures"}
    model = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**fields), dtype=torch.bfloat16)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    ids = torch.zeros(1, SEQ, dtype=torch.int64)
    with Storages() as seen:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        left = seen.alive
        seen.peak = left
        loss.backward()
    return left, seen.peak - left


def test_reentrant_checkpointing_holds_one_more_hidden_state_in_backward() -> None:
    """`CheckpointFunction.backward` holds the gradient of its output while its own backward runs (torch/utils/checkpoint.py).

    On the CPU, whose kernels differ, the peak finds one number per token (a norm's) already gone.
    """
    more = in_trace(True).peak_by_phase["backward"] - in_trace(False).peak_by_phase["backward"]
    (left, above), (left_reentrant, above_reentrant) = on_the_cpu(False), on_the_cpu(True)
    assert left == left_reentrant
    assert more == STATES
    assert abs(above_reentrant - above - STATES) <= 4 * SEQ


def test_both_keep_one_hidden_state_per_layer() -> None:
    for reentrant in (False, True):
        kept = []
        for layers in (2, 3):
            trace = in_trace(reentrant, layers)
            end = next(window.end for window in trace.windows if window.phase == "forward")
            alive = [m.storage.id for m in trace.log[:end] if m.kind == "free"]
            kept_storages = [m.storage for m in trace.log[:end] if m.kind == "alloc" and m.storage.id not in alive]
            kept.append(sum(s.nbytes for s in kept_storages if s.phase == "forward"))
        assert kept[1] - kept[0] == STATES


def test_default_is_not_reentrant() -> None:
    named = traced(llama(1), lora(["q_proj"]), trainer="transformers", seq_len=64, use_reentrant=False)
    assert traced(llama(1), lora(["q_proj"]), trainer="transformers", seq_len=64).peak_by_phase == named.peak_by_phase
