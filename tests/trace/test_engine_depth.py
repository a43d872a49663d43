"""A log made from two shallow traces is, event by event, that of the deep model traced in full."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.depth.expand import in_order, same
from peftplan.depth.shallow import names_layers
from peftplan.libraries.alike import repeating_stacks
from peftplan.trace import engine
from tests.trace.engine_case import llama, lora, traced
from tests.trace.family_configs import MLLAMA

DEPTH = 9
NF4 = {"quant": "nf4", "double_quant": True, "compute_dtype": "bf16"}


def in_full(*args: Any, **kwargs: Any) -> engine.Traced:
    with patch.object(engine, "repeating_stacks", lambda config, **_: ()):
        return traced(*args, **kwargs)


@pytest.mark.parametrize(
    ("peft_config", "options"),
    [
        (None, {"trainer": "plain"}),
        (None, {"trainer": "transformers", "optim": "adamw_bnb_8bit"}),
        (lora(), {"trainer": "transformers"}),
        (lora(), {"trainer": "transformers", **NF4}),
        (lora(use_dora=True, lora_dropout=0.1), {"trainer": "plain"}),
        (lora(), {"trainer": "plain", "quant": "int8", "gradient_checkpointing": True}),
        (lora(), {"trainer": "transformers", "attn_implementation": "eager", "padding": True}),
    ],
)
def test_repeated_layers_are_the_full_trace(peft_config: dict[str, Any] | None, options: dict[str, Any]) -> None:
    short = traced(llama(DEPTH), peft_config, seq_len=32, **options)
    full = in_full(llama(DEPTH), peft_config, seq_len=32, **options)
    assert (short.depths, full.depths) == ((3, 4), ())
    assert same(short.log, in_order(full.log, list(full.began), stack="model.layers"))
    assert short.peak_by_phase == full.peak_by_phase
    assert short.alive == full.alive
    assert short.replayed.peaks == full.replayed.peaks
    assert (short.num_trainable, short.num_total, short.managed_bytes) == (full.num_trainable, full.num_total, full.managed_bytes)


def test_an_optimizer_that_loops_over_parameters_is_traced_in_full() -> None:
    """Adafactor's variables hold the last parameter's tensors into the next layer's, so its events do not repeat cleanly."""
    assert traced(llama(DEPTH), None, trainer="plain", optim="adafactor", seq_len=16).depths == ()


def test_layers_that_differ_are_traced_in_full() -> None:
    sliding = {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 200,
        "num_hidden_layers": 12,
    }
    assert repeating_stacks(sliding, task_type="CAUSAL_LM") == ()
    assert [s.name for s in repeating_stacks(llama(12), task_type="CAUSAL_LM")] == ["model.layers"]
    assert repeating_stacks(llama(7), task_type="CAUSAL_LM") == ()  # two traces of 3 + 4 layers would cost as much


def test_layers_that_the_config_numbers_are_traced_in_full() -> None:
    """Mllama reads the output of layer 7 of its vision tower, which a tower of 4 does not have."""
    vision = {**MLLAMA["vision_config"], "num_hidden_layers": DEPTH}
    places = [repeating_stacks(mllama(vision, indices), task_type="CAUSAL_LM") for indices in ([7], [])]
    assert [[stack.name for stack in stacks] for stacks in places] == [[], ["model.vision_model.transformer.layers"]]
    trace = traced(mllama(vision, [7]), lora(), trainer="transformers", seq_len=16)
    assert (trace.depths, trace.facts["images_per_sample"]) == ((), 1)


def mllama(vision: dict[str, Any], indices: list[int]) -> dict[str, Any]:
    of_vision = {**vision, "intermediate_layers_indices": indices}
    return {"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"], **MLLAMA, "vision_config": of_vision}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"layers_to_transform": [5]}, True),
        ({"target_modules": r"model\.layers\.(1|2)\..*q_proj"}, True),
        ({"rank_pattern": {"layers.3.self_attn.q_proj": 4}}, True),
        ({"target_modules": ["fc1", "wi_0", "q_proj"]}, False),
    ],
)
def test_adapters_that_name_layers(fields: dict[str, Any], expected: bool) -> None:
    assert names_layers({"peft_type": "LORA", **fields}, None) is expected
