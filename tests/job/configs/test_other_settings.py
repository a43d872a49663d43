"""Settings of people's files that the kept ones do not have: dtypes of QLoRA in fp16, texts that look like placeholders."""

from __future__ import annotations

import pytest

from peftplan.job.configs.read import read_text, read_values
from tests.job.configs.files import AXOLOTL, LLAMAFACTORY, SWIFT, TRL

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("values", "changed", "dtypes"),
    [
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True}, ("bf16", "bf16")),
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True, "bf16": False, "fp16": True}, ("fp16", "bf16")),
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True, "bf16": False}, ("fp32", "bf16")),
        (LLAMAFACTORY, {"quantization_bit": 4}, ("bf16", "bf16")),
        (LLAMAFACTORY, {"quantization_bit": 4, "bf16": False, "fp16": True}, ("fp16", "fp16")),
        (SWIFT, {"quant_bits": 4, "quant_method": "bnb"}, ("bf16", None)),
        (SWIFT, {"quant_bits": 4, "quant_method": "bnb", "torch_dtype": "float16"}, ("fp32", None)),
        (SWIFT, {"quant_bits": 4, "quant_method": "bnb", "bnb_4bit_compute_dtype": "float16"}, ("fp16", None)),
    ],
)
def test_the_dtype_in_which_four_bits_are_computed(
    values: dict[str, object], changed: dict[str, object], dtypes: tuple[str, str | None]
) -> None:
    read = read_values({**values, **changed}, file="a.yml").options
    assert (read["compute_dtype"], read.get("quant_storage")) == dtypes


@pytest.mark.parametrize("pattern", [["^lm_head.weight$"], ["<extra>"]])
def test_an_unsupported_key_says_why_whatever_its_text(pattern: list[str]) -> None:
    for key in ("unfrozen_parameters", "tokens"):
        assert "placeholder" not in read_values({**AXOLOTL, key: pattern}, file="a.yml").unsupported[key].why


@pytest.mark.parametrize(
    ("settings", "autocast"),
    [({}, "bf16"), ({"bf16": False}, "none"), ({"bf16": False, "fp16": True}, "fp16"), ({"fp16": True}, "fp16")],
)
def test_trl_without_mixed_precision(settings: dict[str, bool], autocast: str) -> None:
    """TRL computes in bf16 unless a file says no (trl 1.16, trainer/base_config.py:108)."""
    values = {key: value for key, value in TRL.items() if key not in ("bf16", "fp16")}
    assert read_values({**values, **settings}, file="a.yaml").options["autocast"] == autocast
    arguments = ", ".join(f"{key}={value}" for key, value in settings.items())
    program = f"model = AutoModelForCausalLM.from_pretrained('gpt2')\nSFTTrainer(model, args=SFTConfig({arguments}))\n"
    assert read_text(program, file="run.py").options["autocast"] == autocast


@pytest.mark.parametrize(
    ("settings", "checkpoints", "autocast"),
    [("", False, "none"), (", bf16=True, gradient_checkpointing=True", True, "bf16"), (", fp16=True", False, "fp16")],
)
def test_training_arguments_keep_their_own_defaults_in_sft_trainer(settings: str, checkpoints: bool, autocast: str) -> None:
    program = f"model = AutoModelForCausalLM.from_pretrained('gpt2')\nSFTTrainer(model, args=TrainingArguments('x'{settings}))\n"
    read = read_text(program, file="run.py").options
    assert (read["gradient_checkpointing"], read["autocast"]) == (checkpoints, autocast)
