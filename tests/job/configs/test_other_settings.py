"""Settings of people's files that the kept ones do not have: dtypes of QLoRA in fp16, texts that look like placeholders."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftplan.job.configs.read import read_config, read_text, read_values
from tests.job.configs.files import AXOLOTL, LLAMAFACTORY, SWIFT, TRL

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("values", "changed", "dtypes"),
    [
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True}, ("bf16", "bf16")),
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True, "bf16": False, "fp16": True}, ("fp16", "bf16")),
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True, "bf16": None, "fp16": True}, ("fp16", "bf16")),
        (AXOLOTL, {"adapter": "qlora", "load_in_4bit": True, "bf16": "auto", "fp16": True}, ("fp16", "bf16")),
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


@pytest.mark.parametrize(("bf16", "dtype"), [("auto", "fp16"), (None, "fp16"), (True, "bf16"), (False, "fp16")])
@pytest.mark.parametrize("fp16_first", [True, False])
def test_axolotl_trains_in_one_of_two_dtypes(bf16: object, dtype: str, fp16_first: bool) -> None:
    """axolotl 0.19.0, utils/config/__init__.py (`resolve_dtype`), whatever the order of the keys."""
    base = {key: value for key, value in AXOLOTL.items() if key not in ("bf16", "fp16")}
    values = {**base, "fp16": True, "bf16": bf16} if fp16_first else {**base, "bf16": bf16, "fp16": True}
    read = read_values(values, file="a.yml").options
    assert (read["autocast"], read["dtype"]) == (dtype, dtype)


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


@pytest.mark.parametrize(("precision", "autocast"), [("bf16", "bf16"), ("fp16", "fp16"), ("no", "none")])
@pytest.mark.parametrize(
    "settings",
    [
        "Trainer(model, TrainingArguments('x'))",
        "SFTTrainer(model, TrainingArguments('x'))",
        "SFTTrainer(model, SFTConfig(bf16=False))",
    ],
)
def test_a_launch_file_decides_the_precision_of_a_program_without_one(
    tmp_path: Path, settings: str, precision: str, autocast: str
) -> None:
    """transformers 5.24, training_args.py:1614."""
    (program := tmp_path / "run.py").write_text(f"model = AutoModelForCausalLM.from_pretrained('gpt2')\n{settings}\n")
    (launch := tmp_path / "launch.yaml").write_text(
        f"distributed_type: MULTI_GPU\nmixed_precision: {precision}\nnum_processes: 2\nnum_machines: 1\n"
    )
    assert read_config([program, launch]).options["autocast"] == autocast


def test_a_named_launch_file_decides_the_precision_of_trl_without_one() -> None:
    values = {**TRL, "bf16": False, "accelerate_config": "zero2"}
    assert read_values(values, file="a.yaml").options["autocast"] == "bf16"


@pytest.mark.parametrize("arguments", ["TrainingArguments('x')", "SFTConfig(gradient_checkpointing=False)"])
@pytest.mark.parametrize(("argument", "checkpoints"), [("", True), (", use_gradient_checkpointing=False", False)])
def test_peft_checkpoints_a_quantized_base_whatever_the_trainer_says(arguments: str, argument: str, checkpoints: bool) -> None:
    """prepare_model_for_kbit_training enables checkpoints (peft 0.21.2, utils/other.py); no trainer disables them."""
    program = (
        "model = AutoModelForCausalLM.from_pretrained('gpt2', quantization_config=BitsAndBytesConfig(load_in_4bit=True))\n"
        f"model = prepare_model_for_kbit_training(model{argument})\n"
        f"SFTTrainer(model, {arguments}, peft_config=LoraConfig(r=8)).train()\n"
    )
    assert read_text(program, file="run.py").options["gradient_checkpointing"] is checkpoints
