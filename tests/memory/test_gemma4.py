"""Gemma 4 at small widths: the formulas of its layers against the trace, the text model alone and the text part beside towers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import peftplan
from peftplan.errors import RefusedError
from peftplan.job.sources import load_config
from tests.memory.engines import by_phase

DENSE = "ssfssf"
SMALL: dict[str, Any] = {
    "hidden_size": 440,
    "intermediate_size": 1136,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 64,
    "global_head_dim": 320,
    "vocab_size": 3009,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense": ("gemma-4-31b", DENSE, {}),
    "dense, a window within the rows": ("gemma-4-31b", DENSE, {"sliding_window": 100}),
    "unified": ("gemma-4-12b-it", DENSE, {"num_global_key_value_heads": 1, "sliding_window": 100}),
    "borrowed keys and own inputs": (
        "gemma-4-e2b-it",
        "ssfssfssf",
        {
            "num_global_key_value_heads": None,
            "num_kv_shared_layers": 4,
            "hidden_size_per_layer_input": 48,
            "vocab_size_per_layer_input": 3009,
        },
    ),
    "experts": ("gemma-4-26b-a4b", DENSE, {"num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 176}),
}
"""The published model, its layers (sliding or full), and the widths that are its own."""
ON, OFF = {"gradient_checkpointing": True}, {"gradient_checkpointing": False}
EVEN, ODD = {"batch_size": 2, "seq_len": 256}, {"batch_size": 3, "seq_len": 250}
EAGER = {"attn_implementation": "eager"}
DDP: dict[str, Any] = {"gpus": 4, "strategy": "ddp"}
WRAPPED = {"transformer_cls_names_to_wrap": ("Gemma4TextDecoderLayer", "Gemma4VisionEncoderLayer")}
IN_TEXT = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
TOLERANCE = 0.001
"""Lists of small integers that only the trace has."""
LORA: dict[str, Any] = {"method": "lora", "trainer": "transformers"}
QLORA: dict[str, Any] = {"method": "qlora", "trainer": "trl", "padding": True}
JOBS: list[tuple[str, bool, dict[str, Any]]] = [
    ("dense", True, {**LORA, **ON, **EVEN, "padding": True}),
    ("dense", True, {**LORA, **OFF, **ODD, "trainer": "plain"}),
    ("dense", False, {**LORA, "method": "full", "trainer": "trl", **ON, **ODD}),
    ("dense, a window within the rows", False, {**LORA, **OFF, **EVEN, **EAGER, "dtype": "fp32", "autocast": "bf16"}),
    ("unified", True, {**LORA, **ON, **EVEN, "padding": True}),
    ("unified", True, {**LORA, **OFF, **EVEN, **EAGER}),
    ("unified", False, {**LORA, "method": "full", "dtype": "fp32", "autocast": "bf16", **OFF, **ODD, "trainer": "plain"}),
    ("borrowed keys and own inputs", False, {**LORA, **ON, **EVEN}),
    ("borrowed keys and own inputs", False, {**LORA, **OFF, **EVEN, "target_modules": ["q_proj", "v_proj"]}),
    ("borrowed keys and own inputs", False, {**LORA, "method": "full", **ON, **EVEN}),
    ("borrowed keys and own inputs", False, {**QLORA, **ON, **EVEN}),
    ("borrowed keys and own inputs", True, {**LORA, **ON, **EVEN, **EAGER}),
    ("borrowed keys and own inputs", True, {**LORA, **ON, **EVEN}),  # whose tower of sounds has no sdpa
    ("experts", True, {**QLORA, **ON, **EVEN}),
    ("experts", False, {**LORA, **ON, **ODD, **EAGER, "trainer": "plain"}),
    ("experts", False, {**LORA, "method": "full", "trainer": "trl", **ON, **ODD}),
    ("unified", True, {**LORA, **EVEN, **DDP}),
    ("dense", False, {**LORA, **OFF, **EVEN, **DDP, "trainer": "trl"}),
    (
        "borrowed keys and own inputs",
        False,
        {"method": "full", "trainer": "trl", "gradient_accumulation_steps": 2, **EVEN, **DDP},
    ),
    ("experts", False, {"method": "full", "trainer": "transformers", **EVEN, **DDP}),
    ("unified", True, {**LORA, **OFF, **EVEN}),
]
"""A model, whether towers are beside it, and how it is trained."""


def config_of(name: str, *, towers: bool) -> dict[str, Any]:
    """The small config, of the text model alone or with two layers of each tower."""
    model, layers, own = MODELS[name]
    config: dict[str, Any] = copy.deepcopy(dict(load_config(model)))
    text: dict[str, Any] = {**config["text_config"], **SMALL, **own, "num_hidden_layers": len(layers)}
    text["layer_types"] = ["full_attention" if layer == "f" else "sliding_attention" for layer in layers]
    if not towers:
        stem = "Gemma4" if config["model_type"] == "gemma4" else "Gemma4Unified"
        text.pop("dtype", None)
        return {**text, "model_type": f"{config['model_type']}_text", "architectures": [f"{stem}ForCausalLM"]}
    config["text_config"] = text
    for part in ("vision_config", "audio_config"):
        if config.get(part) and "num_hidden_layers" in config[part]:
            config[part]["num_hidden_layers"] = 2
    return config


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("model", "towers", "options"), JOBS)
def test_both_engines_agree(model: str, towers: bool, options: dict[str, Any]) -> None:
    if towers:
        options = {"target_modules": IN_TEXT, **options}
    config = config_of(model, towers=towers)
    ours, traced = (
        by_phase(peftplan.estimate(copy.deepcopy(config), engine=engine, **options)) for engine in ("analytic", "trace")
    )
    for phase, num_bytes in traced.items():
        assert ours[phase] == pytest.approx(num_bytes, rel=TOLERANCE), phase


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (
            {"method": "full", "target_modules": None, "gpus": 4, "strategy": "fsdp1", **WRAPPED},
            "over 4 GPUs and transformer_cls_names_to_wrap",
        ),
        ({"trainer": "trl-dpo"}, "model type gemma4 and"),
        ({"trainer": "swift-text-part"}, "model type gemma4 and Seq2SeqTrainer of ms-swift"),
        ({"use_reentrant": True}, "model type gemma4 with reentrant checkpoints"),
        ({"method": "ia3", "feedforward_modules": []}, "model type gemma4 with method ia3"),
        ({"quant": "int8"}, "model type gemma4 with a base in int8"),
        ({"method": "pfeiffer", "target_modules": None}, "model type gemma4 with method pfeiffer"),
        ({"method": "lisa", "target_modules": None}, "layers that take turns in model type gemma4"),
    ],
)
def test_what_was_not_compared_has_no_formula(options: dict[str, Any], missing: str) -> None:
    options = {"method": "lora", "target_modules": IN_TEXT, **options}
    result = peftplan.estimate("gemma-4-31b", **{name: value for name, value in options.items() if value is not None})
    assert result.peaks is None
    assert missing in result.not_modelled[0]


def test_flash_attention_has_no_kernel_for_wide_heads() -> None:
    options = {**LORA, **OFF, **EVEN, "attn_implementation": "flash_attention_2", "padding": False}
    with pytest.raises(RefusedError, match="heads of 320 numbers"):
        peftplan.estimate(config_of("dense", towers=False), **options)


@pytest.mark.parametrize("model", ["gemma-4-31b", "gemma-4-12b-it", "gemma-4-26b-a4b", "gemma-4-e2b-it", "gemma-4-e4b-it"])
def test_published_models_have_an_instant_peak(model: str) -> None:
    result = peftplan.estimate(model, method="qlora", trainer="trl", target_modules=IN_TEXT, gpu="h100-80gb")
    assert result.engine == "analytic"
    assert result.peaks is not None
    assert result.peaks.reserved
    assert result.gpus[0].scope == "text"
