"""What each trainer sets where the user does not, written down by hand; what is set wins."""

from __future__ import annotations

from typing import Any

import pytest

import peftplan
from peftplan.errors import InputError, RefusedError
from tests.planning.tiny import CONFIG

ALWAYS = {
    "batch_size": 1,
    "seq_len": 2048,
    "gradient_accumulation_steps": 1,
    "padding": False,
    "dtype": "bf16",
    "attn_implementation": "sdpa",
    "keep_gradients": False,
}
TRAINER = {
    "autocast": "bf16",
    "gradient_checkpointing": True,
    "optim": "adamw_torch_fused",
    "loss": "full",
    "keep_outputs": False,
    "use_cache": False,
}
EXPECTED: dict[str, dict[str, Any]] = {
    "transformers": TRAINER,
    "trl": {**TRAINER, "loss": "trl-chunked"},
    "plain": {
        "autocast": "none",
        "gradient_checkpointing": False,
        "optim": "adamw_torch",
        "loss": "full",
        "keep_outputs": True,
        "use_cache": True,  # as the model's config says, and transformers' default is True
    },
    "qlora-paper": {**TRAINER, "optim": "paged_adamw_32bit"},
}
ON_QUANTIZED = {
    # (kbit_prepare, adapter_dtype)
    "transformers": (True, "fp32"),
    "trl": (False, "bf16"),
    "plain": (True, "fp32"),
    "qlora-paper": (True, "fp32"),
}


def assumed(model: Any = CONFIG, **options: Any) -> dict[str, Any]:
    """What an estimate assumed of the run, without notes; the card's kernels matter only where there is a peak."""
    assumptions = peftplan.estimate(model, **options).assumptions
    return {name: value for name, value in assumptions.items() if name not in ("compute_capability", "notes")}


@pytest.mark.parametrize("trainer", EXPECTED)
def test_a_preset_fills_what_is_not_set(trainer: str) -> None:
    values = assumed(trainer=trainer)
    expected = ALWAYS | EXPECTED[trainer] | {"trainer": trainer, "quant": "none", "kbit_prepare": False, "adapter_dtype": "fp32"}
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize("trainer", EXPECTED)
def test_a_preset_on_a_quantized_base(trainer: str) -> None:
    values = assumed(trainer=trainer, quant="nf4")
    assert (values["kbit_prepare"], values["adapter_dtype"]) == ON_QUANTIZED[trainer]
    assert (values["double_quant"], values["compute_dtype"]) == (False, "bf16")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"quant": "int8"}, {}),
        ({"quant": "fp8"}, {}),
        ({"quant": "awq", "quant_group_size": 32}, {"quant_group_size": 32}),
        ({"quant": "gptq", "quant_bits": 8}, {"quant_bits": 8, "quant_group_size": 128}),
        ({"quant": "hqq"}, {"quant_bits": 4, "quant_group_size": 64}),
        ({"quant": "hqq", "compute_dtype": "fp16"}, {"quant_bits": 4, "quant_group_size": 64, "compute_dtype": "fp16"}),
        ({"quant": "nf4"}, {"double_quant": False, "compute_dtype": "bf16"}),
    ],
)
def test_a_format_says_its_own_options(options: dict[str, Any], expected: dict[str, Any]) -> None:
    """transformers 5.24, utils/quantization_config.py: GPTQConfig groups by 128, HqqConfig has 4 bits by 64."""
    words = ("double_quant", "compute_dtype", "quant_bits", "quant_group_size")
    values = assumed(**options)
    assert {name: values[name] for name in words if name in values} == expected
    served = peftplan.serving(CONFIG, **options).assumptions
    assert {name: served[name] for name in words if name in served} == {k: v for k, v in expected.items() if k != "compute_dtype"}


def test_a_position_table_bounds_the_sequence() -> None:
    """GPT-2 has 1,024 positions, RoBERTa 514 rows of which two stand before the first, OPT 2,048 and two rows more."""
    longest = {"gpt2": 1024, "roberta-base": 512, "opt-125m": 2048, "bart-base": 1024, "whisper-tiny": 448}
    for model, positions in longest.items():
        assert peftplan.estimate(model, method="full").assumptions["seq_len"] == positions
        with pytest.raises(InputError, match=f"seq_len: 4096 is not valid; accepted: up to {positions}, the positions"):
            peftplan.estimate(model, method="full", seq_len=4096)
    with pytest.raises(InputError, match="seq_len: 1025 is not valid"):
        peftplan.estimate("gpt2", method="full").at(seq_len=1025)


def test_the_default_trainer_is_transformers() -> None:
    assert assumed()["trainer"] == "transformers"
    assert assumed() == assumed(trainer="transformers")


SET = {
    "autocast": "fp16",
    "gradient_checkpointing": None,  # the opposite of the preset's, see the test
    "optim": "sgd",
    "loss": "liger",
    "keep_outputs": None,
    "use_cache": None,
    "kbit_prepare": None,
    "adapter_dtype": "fp16",
    "batch_size": 7,
    "seq_len": 33,
    "gradient_accumulation_steps": 3,
    "padding": True,
    "dtype": "fp16",
    "attn_implementation": "eager",
    "keep_gradients": True,
}


IMPOSSIBLE = {
    **{(trainer, "keep_outputs"): f"{trainer} drops the outputs" for trainer in ("transformers", "qlora-paper", "trl")},
    ("trl", "autocast"): "fp16 training cannot unscale bf16 gradients",
}


@pytest.mark.parametrize("name", SET)
@pytest.mark.parametrize("trainer", EXPECTED)
def test_what_is_set_wins(trainer: str, name: str) -> None:
    preset = assumed(trainer=trainer, quant="nf4")
    value = not preset[name] if SET[name] is None else SET[name]
    if trainer == "trl" and name == "loss":
        value = "unsloth"
    assert preset[name] != value
    if (why := IMPOSSIBLE.get((trainer, name))) is not None:
        with pytest.raises(RefusedError, match=f"{name}: {why}"):
            assumed(trainer=trainer, quant="nf4", **{name: value})
        return
    values = assumed(trainer=trainer, quant="nf4", **{name: value})
    also = {"dtype": {"compute_dtype": "fp16"}}.get(name, {})  # which follows the dtype where it is not set
    assert values == preset | {name: value} | also


def test_qlora_is_nf4_with_double_quantization() -> None:
    values = assumed(method="qlora")
    assert (values["quant"], values["double_quant"], values["compute_dtype"], values["kbit_prepare"]) == (
        "nf4",
        True,
        "bf16",
        True,
    )
    assert assumed(method="qlora", double_quant=False)["double_quant"] is False
    assert assumed(method="qlora", dtype="fp16")["compute_dtype"] == "bf16"
    assert assumed(method="qlora", quant="int8")["quant"] == "int8"


@pytest.mark.parametrize(
    ("method", "targets"),
    [
        # LoRA's family adapts all linear layers; every other method what peft's own mapping says for Llama
        ("lora", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("qlora", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("dora", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("ia3", ["k_proj", "v_proj", "down_proj"]),
        ("vera", ["q_proj", "v_proj"]),
    ],
)
def test_default_targets(method: str, targets: list[str]) -> None:
    assert {name.rpartition(".")[2] for name in assumed(method=method)["target_modules"]} == set(targets)


def test_an_adapter_config_without_targets_takes_pefts_own() -> None:
    assert assumed(peft_config={"peft_type": "LORA", "target_modules": None})["target_modules"] == ["q_proj", "v_proj"]


def test_words_of_target_modules_are_resolved() -> None:
    assert assumed(target_modules="attention")["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert assumed(target_modules="mlp")["target_modules"] == ["gate_proj", "up_proj", "down_proj"]
    assert assumed(target_modules="attention")["matched_modules"] == 2 * 4


def test_a_model_without_sdpa_runs_eager() -> None:
    assert assumed("bloom-560m")["attn_implementation"] == "eager"
    with pytest.raises(peftplan.RefusedError, match="accepted: eager"):
        assumed("bloom-560m", attn_implementation="sdpa")


def test_a_plain_loop_asks_the_config_for_the_cache() -> None:
    assert assumed({**CONFIG, "use_cache": False}, trainer="plain")["use_cache"] is False


def test_r_is_8_where_it_is_not_set() -> None:
    assert peftplan.estimate(CONFIG).method["config"]["r"] == 8
