"""Checkpointing of every n-th layer: what it keeps, which layers count, and deep models made from shallow ones."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from peftplan.depth.expand import in_order, same
from peftplan.errors import InputError
from peftplan.job.resolving import resolved
from peftplan.job.setup import parse_setup
from peftplan.trace import engine
from peftplan.trace.model import build
from tests.memory.families import T5
from tests.trace.engine_case import llama, lora, traced


def forward(layers: int, **options: Any) -> int:
    return traced(llama(layers), lora(), seq_len=64, **options).peak_by_phase["forward"]


def test_a_layer_that_is_not_checkpointed_keeps_what_it_keeps_without_checkpointing() -> None:
    """Two layers more are one checkpointed layer more and one that is not."""
    both = forward(5, every_n_layers=2) - forward(3, every_n_layers=2)
    checkpointed = forward(4) - forward(3)
    kept = forward(4, gradient_checkpointing=False) - forward(3, gradient_checkpointing=False)
    assert both == checkpointed + kept
    assert kept > checkpointed


def test_the_first_layer_is_always_checkpointed() -> None:
    every, first, none = (forward(2, **o) for o in ({}, {"every_n_layers": 2}, {"gradient_checkpointing": False}))
    assert every == forward(2, every_n_layers=1)
    assert first == forward(2, every_n_layers=100)
    assert every < first < none


def flags(config: dict[str, Any], peft_config: dict[str, Any] | None, task_type: str, every: int) -> dict[str, bool]:
    setup = resolved(parse_setup({"every_n_layers": every}), quantized=False, supports_sdpa=True, use_cache=False)
    built = build(
        config, task_type=task_type, peft_config=peft_config, quant=None, setup=setup, wide=(), divide=lambda _model: None
    )
    layers = {name: m for name, m in built.base.named_modules() if name.rpartition(".")[2].isdigit()}
    return {name: m.gradient_checkpointing for name, m in layers.items() if hasattr(m, "gradient_checkpointing")}


def test_layers_are_counted_through_encoder_and_decoder() -> None:
    """`_set_gradient_checkpointing` counts in the order of `modules()` (transformers 5.24, modeling_utils.py)."""
    by_module = flags({**T5, "num_layers": 3, "num_decoder_layers": 4}, None, "SEQ_2_SEQ_LM", 2)
    blocks = {name: flag for name, flag in by_module.items() if ".layer." not in name}
    assert [blocks[f"encoder.block.{n}"] for n in range(3)] == [True, False, True]
    assert [blocks[f"decoder.block.{n}"] for n in range(4)] == [False, True, False, True]


def test_layers_that_peft_replicates_count() -> None:
    """Trainer asks for checkpointing when training begins, after peft has made its layers."""
    by_module = flags(llama(2), lora(layer_replication=[[0, 2], [0, 2], [1, 2]]), "CAUSAL_LM", 3)
    assert list(by_module.values()) == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("layers", "every", "peft_config", "options", "depths"),
    [
        (16, 2, None, {"trainer": "plain", "gradient_checkpointing": True}, (6, 8)),
        (17, 2, lora(["q_proj"]), {"trainer": "transformers", "use_reentrant": True}, (7, 9)),
    ],
)
def test_repeated_periods_are_the_full_trace(
    layers: int, every: int, peft_config: dict[str, Any] | None, options: dict[str, Any], depths: tuple[int, ...]
) -> None:
    traced(llama(1), None, seq_len=16)  # the first trace of a process makes a few numbers more
    short = traced(llama(layers), peft_config, seq_len=16, every_n_layers=every, **options)
    with patch.object(engine, "repeating_stacks", lambda config, **_: ()):
        full = traced(llama(layers), peft_config, seq_len=16, every_n_layers=every, **options)
    assert (short.depths, full.depths) == (depths, ())
    assert same(short.log, in_order(full.log, list(full.began), stack="model.layers"))
    assert short.alive == full.alive
    assert short.replayed.peaks == full.replayed.peaks
    assert (short.num_trainable, short.num_total, short.managed_bytes) == (full.num_trainable, full.num_total, full.managed_bytes)


def test_periods_that_hardly_repeat_are_traced_in_full() -> None:
    assert traced(llama(9), None, seq_len=16, every_n_layers=4).depths == ()


def test_bad_values_are_refused() -> None:
    def of(**options: Any) -> None:
        resolved(parse_setup(options), quantized=False, supports_sdpa=True, use_cache=False)

    with pytest.raises(InputError, match=r"every_n_layers must be at least 1 \(got 0\)"):
        of(every_n_layers=0)
    with pytest.raises(InputError, match="every_n_layers: 2 is not valid; accepted: 1, or more with gradient_checkpointing"):
        of(every_n_layers=2, gradient_checkpointing=False)
    of(every_n_layers=1, gradient_checkpointing=False)
