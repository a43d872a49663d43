"""Settings of people's files that the kept ones do not have: dtypes of QLoRA in fp16, texts that look like placeholders."""

from __future__ import annotations

import pytest

from peftplan.job.configs.read import read_values
from tests.job.configs.files import AXOLOTL, LLAMAFACTORY, SWIFT

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
